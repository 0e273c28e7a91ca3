"""Test that the server answers in OpenAI's wire format as the library does, whole and streamed."""

import base64
import hashlib
import re
from typing import Any

import pytest

from llama import Llama, tuning
from llama.chat import UNSAFE_ERROR

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from llama.engine.incremental_text import IncrementalText

from . import server_client
from .server_client import CHAT, COMPLETION, MESSAGES, Client, wait_until

client = server_client.client  # a fixture


def test_a_chat_gets_the_answer_of_chat_completion(client: Client, llama: Llama) -> None:
    for options in ({"temperature": 0}, {"temperature": 1.5, "seed": 7, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2}):
        (want,) = llama.chat_completion([MESSAGES], top_p=1.0, max_gen_len=12, details=True, **options)  # type: ignore[list-item, arg-type]
        status, answer = client.post(CHAT, messages=MESSAGES, model="small", max_tokens=12, **options)
        (choice,) = answer["choices"]
        assert status == 200 and answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
        assert choice["message"] == {**want["generation"], "refusal": None}
        assert choice["finish_reason"] == want["finish_reason"] and choice["index"] == 0
        sizes = want["prompt_tokens"], want["new_tokens"]
        *counts, details = answer["usage"].values()
        assert (*counts,) == (*sizes, sum(sizes)) and details.keys() == {"cached_tokens"}
        events = client.stream(
            CHAT, messages=MESSAGES, max_completion_tokens=12, stream_options={"include_usage": True}, **options
        )
        deltas = [event["choices"][0] for event in events[:-1]]
        assert deltas[0]["delta"]["role"] == "assistant" and events[0]["object"] == "chat.completion.chunk"
        assert "".join(c["delta"].get("content", "") for c in deltas) == want["generation"]["content"]
        assert [c["finish_reason"] for c in deltas] == [None] * (len(deltas) - 1) + [want["finish_reason"]]
        assert events[-1]["choices"] == [] and [*events[-1]["usage"].values()][:-1] == counts
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1


def test_penalties_and_what_ends_an_answer_are_those_of_the_library(client: Client, llama: Llama) -> None:
    options: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 5,
        "frequency_penalty": 1.5,
        "presence_penalty": -0.5,
        "typical_p": 0.7,
    }
    (plain,) = llama.chat_completion([MESSAGES], top_p=1.0, max_gen_len=12, logprobs=True, **options)  # type: ignore[list-item]
    tokens = [t.token for t in llama.generate_stream([[1, 5]], 12, top_p=1.0, **options)]
    _, answer = client.post(CHAT, messages=MESSAGES, max_tokens=12, **options)
    assert answer["choices"][0]["message"]["content"] == plain["generation"]["content"]
    ends = {"stop_token_ids": [tokens[2], tokens[4]]}
    for least, n in ((0, 2), (3, None)):
        (want,) = llama.generate([[1, 5]], 12, top_p=1.0, min_new_tokens=least, **ends, **options)[0]
        assert n is None or want == tokens[:2]
        _, answer = client.post(COMPLETION, prompt=[1, 5], max_tokens=12, min_tokens=least, logprobs=0, **ends, **options)
        (choice,) = answer["choices"]
        assert answer["usage"]["completion_tokens"] == len(want)
        assert choice["finish_reason"] == ("stop" if len(want) < 12 else "length")
        assert len(choice["logprobs"]["tokens"]) == len(want) + (len(want) < 12)  # with the token that ended it
    bias = {"logit_bias": {str(llama.tokenizer.eos_id): 100}, "temperature": 0}
    for ignored, (n, reason) in {False: (0, "stop"), True: (4, "length")}.items():
        _, answer = client.post(COMPLETION, prompt=[1, 5], max_tokens=4, ignore_eos=ignored, logprobs=0, **bias)
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (n, reason)
    _, answer = client.post(CHAT, messages=[*MESSAGES], min_tokens=40, temperature=0)  # more than the rest of the context
    assert answer["choices"][0]["finish_reason"] == "length"


def test_content_in_parts_and_empty_fields_of_earlier_answers_are_accepted(client: Client) -> None:
    parts = [{"type": "text", "text": "What is the "}, {"type": "text", "text": "capital of France?"}]
    answer = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None, "annotations": []}
    whole = [*MESSAGES, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    in_parts = [{"role": "user", "content": parts}, answer, {"role": "user", "content": "b"}]
    results = [client.post(CHAT, messages=m, temperature=0, max_tokens=3) for m in (whole, in_parts)]
    assert results[0][0] == 200 and results[0][1]["choices"] == results[1][1]["choices"]


def test_a_dialog_with_special_tags_gets_the_refusal_as_its_answer(client: Client) -> None:
    unsafe = [{"role": "user", "content": "[INST]"}]
    _, answer = client.post(CHAT, messages=unsafe)
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == (UNSAFE_ERROR, "stop")
    assert [*answer["usage"].values()] == [0, 0, 0, {"cached_tokens": 0}]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in client.stream(CHAT, messages=unsafe)) == UNSAFE_ERROR


def test_completions_of_texts_and_tokens_continue_their_prompts(client: Client, llama: Llama) -> None:
    texts = ["The quick", "She sells"]
    tokens = [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    want = [r["generation"] for r in llama.text_completion(texts, 0, max_gen_len=16, echo=True)]
    prompts: list[tuple[Any, int]] = [(texts, 2), (tokens, 2), (texts[0], 1), (tokens[0], 1)]
    for prompt, n in prompts:
        for echo in (False, True):
            _, answer = client.post(COMPLETION, prompt=prompt, temperature=0, echo=echo)
            got = [choice["text"] for choice in answer["choices"]]
            assert [("" if echo else text) + each for text, each in zip(texts, got, strict=False)] == want[:n]
            streamed = [""] * n
            for event in client.stream(COMPLETION, prompt=prompt, temperature=0, echo=echo):
                streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert streamed == got
        assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens[:n]))


def test_several_choices_have_seeds_that_follow_each_other(client: Client, llama: Llama) -> None:
    _, answer = client.post(COMPLETION, prompt=["The", "Once"], n=3, seed=5, max_tokens=9)
    want = llama.text_completion(
        ["The"] * 3 + ["Once"] * 3, 1.0, 1.0, max_gen_len=9, seed=[5, 6, 7, 8, 9, 10], echo=True, details=True
    )
    prompts = ["The"] * 3 + ["Once"] * 3
    assert [p + c["text"] for p, c in zip(prompts, answer["choices"], strict=True)] == [r["generation"] for r in want]
    assert answer["usage"]["completion_tokens"] == sum(r["new_tokens"] for r in want)


def test_usage_tells_how_many_tokens_of_the_prompt_were_cached(
    client: Client, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt with several answers counts as computed, unless it was in the cache before."""
    for name in ("ATTENTION_CHUNK", "MIN_SHARED_PREFIX", "MIN_AWAITED_PREFIX"):
        monkeypatch.setattr(tuning, name, 4)
    fields: dict[str, Any] = {"prompt": [1, *range(20, 40)], "temperature": 0, "max_tokens": 2}
    for n in (1, 3):
        llama.clear_prefix_cache()
        for want in (0, 16):
            usage = client.post(COMPLETION, n=n, **fields)[1]["usage"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": want} and usage["prompt_tokens"] == 21
    events = client.stream(COMPLETION, stream_options={"include_usage": True}, **fields)
    assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    content = "".join(map(str, range(9)))
    for want in (False, True):
        usage = client.post(CHAT, messages=[{"role": "user", "content": content}], max_tokens=1)[1]["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == want


def test_a_stop_string_ends_an_answer_and_frees_its_row(client: Client, llama: Llama) -> None:
    whole = client.post(COMPLETION, prompt="The", temperature=0, max_tokens=40)[1]["choices"][0]["text"]
    stop = whole[8:10]
    _, answer = client.post(COMPLETION, prompt="The", temperature=0, max_tokens=40, stop=["never", stop])
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)] and answer["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: llama.engine.shared.turn.thread is None)


@pytest.mark.parametrize("temperature", [0, 3.0])
def test_logprobs_are_those_of_the_library_and_their_bytes_are_the_text(
    client: Client, llama: Llama, temperature: float
) -> None:
    """At temperature 3, the answer contains bytes of incomplete characters."""
    options = dict(temperature=temperature, seed=3, max_tokens=30)
    (want,) = llama.chat_completion([MESSAGES], temperature, 1.0, max_gen_len=30, logprobs=True, seed=3)  # type: ignore[list-item]
    choice = client.post(CHAT, messages=MESSAGES, logprobs=True, **options)[1]["choices"][0]
    content = choice["logprobs"]["content"]
    assert [t["logprob"] for t in content] == pytest.approx(want["logprobs"], abs=1e-4)
    assert bytes(b for t in content for b in t["bytes"]).decode(errors="replace") == choice["message"]["content"]
    events = client.stream(CHAT, messages=MESSAGES, logprobs=True, **options)
    streamed = [t for e in events for t in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [t["token"] for t in streamed] == [t["token"] for t in content]

    (want_text,) = llama.text_completion(["The"], temperature, 1.0, max_gen_len=30, logprobs=True, echo=True, seed=3)
    choice = client.post(COMPLETION, prompt="The", logprobs=0, echo=True, **options)[1]["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(want_text["logprobs"][1:], abs=1e-4)
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


def test_chats_have_the_likeliest_tokens_whole_and_streamed(client: Client, llama: Llama) -> None:
    options = dict(messages=MESSAGES, temperature=0, max_tokens=9, logprobs=True, top_logprobs=20)
    (want,) = llama.chat_completion([MESSAGES], 0, max_gen_len=9, logprobs=True, top_logprobs=20)  # type: ignore[list-item]
    content = client.post(CHAT, options)[1]["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [20] * len(want["tokens"])
    for token, top in zip(content, want["top_logprobs"], strict=True):
        assert token["top_logprobs"][0] == {name: token[name] for name in ("token", "logprob", "bytes")}  # it is greedy
        assert [each["logprob"] for each in token["top_logprobs"]] == pytest.approx([value for _, value in top], abs=1e-4)
    first = content[0]["top_logprobs"]  # the space before an answer is left out
    assert {t["token"] for t in first} >= {text for text, _ in want["top_logprobs"][0] if text.isascii() and text.isalpha()}
    events = client.stream(CHAT, **options)
    assert [t for e in events for t in (e["choices"][0]["logprobs"] or {"content": []})["content"]] == content


def test_completions_have_the_likeliest_tokens_and_the_chosen_one(client: Client, llama: Llama) -> None:
    """Score a prompt, and sample an answer of unlikely tokens."""
    tokens = llama.tokenizer.encode("The quick", bos=True, eos=False)
    (want,) = llama.text_completion(["The quick"], max_gen_len=0, logprobs=True, top_logprobs=5, echo=True)
    for prompt in ("The quick", tokens):
        fields: dict = dict(prompt=prompt, max_tokens=0, echo=True, logprobs=5)
        choice = client.post(COMPLETION, fields)[1]["choices"][0]
        logprobs = choice["logprobs"]
        assert choice["text"] == "The quick" == "".join(logprobs["tokens"]) and choice["finish_reason"] == "length"
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(want["logprobs"][1:], abs=1e-4)
        for text, value, by_text, top in zip(*list(logprobs.values())[:3], want["top_logprobs"], strict=True):
            if by_text is not None:
                assert by_text[text] == value and len(by_text) in (5, 6)
                assert [*by_text.values()][:5] == pytest.approx([v for _, v in top], abs=1e-4)
        (event, last) = client.stream(COMPLETION, **fields)
        assert event["choices"][0]["logprobs"] == logprobs and last["choices"][0]["finish_reason"] == "length"
    assert client.post(COMPLETION, prompt=[tokens] * 2, max_tokens=0, echo=True, logprobs=0)[1]["choices"][1]["index"] == 1
    for temperature, n in ((0, 1), (9, 2)):
        _, answer = client.post(COMPLETION, prompt="The", temperature=temperature, seed=1, logprobs=1, max_tokens=5)
        logprobs = answer["choices"][0]["logprobs"]
        assert [len(top) for top in logprobs["top_logprobs"]] == [n] * 5
        assert all(top[text] == value for text, value, top, _ in zip(*logprobs.values(), strict=True))


def test_the_end_of_a_completion_is_among_the_tokens_of_its_logprobs(client: Client, llama: Llama) -> None:
    """Programs that score texts ask for one token more, and drop the last one; EOS must not be missing there."""
    eos = {str(llama.tokenizer.eos_id): 100}
    fields: dict = dict(prompt="The", max_tokens=3, temperature=0, logit_bias=eos, logprobs=1, echo=True)
    _, answer = client.post(COMPLETION, fields)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    n = len(llama.tokenizer.encode("The", bos=True, eos=False))
    assert [len(values) for values in logprobs.values()] == [n + 1] * 4
    assert (logprobs["tokens"][-1], logprobs["text_offset"][-1], choice["text"]) == ("", 3, "The")
    assert choice["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 0
    assert logprobs["top_logprobs"][-1][""] == logprobs["token_logprobs"][-1] < -1  # the model's own, without the bias
    streamed = [e["choices"][0]["logprobs"] for e in client.stream(COMPLETION, **fields)]
    assert [token for each in streamed if each for token in each["tokens"]] == logprobs["tokens"]
    chat = client.post(CHAT, messages=MESSAGES, logit_bias=eos, temperature=0, logprobs=True)[1]["choices"][0]
    assert (chat["message"]["content"], chat["logprobs"]) == ("", None)


def test_a_logit_bias_chooses_and_bans_tokens(client: Client, llama: Llama) -> None:
    for path, fields in ((CHAT, {"messages": MESSAGES}), (COMPLETION, {"prompt": "The"})):
        for temperature in (0, 1.0):
            body = {**fields, "max_tokens": 3, "temperature": temperature, "seed": 4, "logit_bias": {"300": 100, "5": -1.5}}
            _, answer = client.post(path, body)
            choice = answer["choices"][0]
            text = choice["text"] if path == COMPLETION else choice["message"]["content"]
            assert text.strip() == llama.tokenizer.decode([300] * 3).strip()


def test_a_chat_continues_an_answer_that_has_begun(client: Client, llama: Llama) -> None:
    for beginning in ("The capital", " "):
        dialog: Any = [*MESSAGES, {"role": "assistant", "content": beginning}]
        (want,) = llama.chat_completion([dialog], 0, max_gen_len=9, continue_answer=True, logprobs=True)
        _, answer = client.post(CHAT, messages=dialog, temperature=0, max_tokens=9, logprobs=True)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == want["generation"]["content"]
        spelled = bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"])
        assert choice["message"]["content"] == spelled.decode(errors="replace")
        events = client.stream(CHAT, messages=dialog, temperature=0, max_tokens=9)
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        assert text == want["generation"]["content"]
    status, refused = client.post(CHAT, messages=[*MESSAGES, *MESSAGES])
    assert status == 400 and "merge messages 0 and 1" in refused["error"]["message"]
    unsafe = [*MESSAGES, {"role": "assistant", "content": "[/INST]"}]
    assert client.post(CHAT, messages=unsafe)[1]["choices"][0]["message"]["content"] == UNSAFE_ERROR


def test_a_prompt_may_end_within_a_character(client: Client, llama: Llama) -> None:
    """Echo a prompt whose last token is the second of the three bytes of the euro sign, then let the third follow."""
    tokens = llama.tokenizer.encode("The \u20ac", bos=True, eos=False)
    _, cut = client.post(COMPLETION, prompt=tokens[:-1], max_tokens=0, echo=True)
    assert cut["choices"][0]["text"] == llama.tokenizer.decode(tokens[:-1]) == "The \ufffd\ufffd"
    assert cut["choices"][0]["finish_reason"] == "length"
    text = IncrementalText(llama.tokenizer)
    assert text.begin(tokens[:-1]) + text.push(tokens[-1]) == "The \u20ac"


def test_the_page_runs_only_its_own_script(client: Client) -> None:
    response = client.begin("GET", "/")
    page, policy = response.read(), response.headers["content-security-policy"]
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert response.status == 200 and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(rb"https?://|src=|innerHTML| on\w+=| style=", page.replace(b'href="data:,"', b""))
