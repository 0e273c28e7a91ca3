"""Test text that is decoded token by token, stop strings, streams, and chats."""

import itertools
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import InputError, Llama, Tokenizer, resolve_model_paths, tuning
from llama.chat import UNSAFE_ERROR
from llama.engine.incremental_text import IncrementalText, check_stop

from .counting import count_forward_tokens
from .support import ROOT

TEXTS = [
    "Once upon a time", " leading", "", "a\n\nb\tc", "  two  spaces  ", "黄沙百战穿金甲，不破楼兰终不还",
    "🦙🗽✈️ and 🧑🏽‍🚀, 👩‍👩‍👧!", "🇳🇴🇮🇹🇫🇷", "e\u0301 vs é, a\u0308\u0323o", "1️⃣2️⃣",
    "한국어 \u1112\u1161\u11ab", "नमस्ते क्षत्रिय", "مرحبا بالعالم", "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e007f",
    "a\u0000b", "x" * 40, "z" + "\u0301" * 90,
]  # fmt: skip


@pytest.fixture(params=["trained", "demo", "llama2"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    if request.param == "demo":
        return Tokenizer(ROOT / "demo" / "tokenizer.model")
    return tokenizer if request.param == "trained" else request.getfixturevalue("llama2_tokenizer")


def text_chunks(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Decode tokens one by one. Return a list of the text that each token completes, which may be empty, and the text that is
    left at the end."""
    text = IncrementalText(tokenizer)
    return [*(text.push(token) for token in tokens), text.end()]


def random_tokens(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Return tokens of all types: words, valid and invalid UTF-8 bytes, control tokens, and leading spaces."""
    sp = tokenizer.sp_model
    bytes_ = [i for i in range(tokenizer.n_words) if sp.is_byte(i)]
    space, text_tokens = sp.piece_to_id("▁"), [i for t in TEXTS for i in sp.encode(t)]
    tokens: list[int] = []
    while len(tokens) < 40:
        choice = rng.randrange(6)
        start = rng.randrange(len(text_tokens))
        tokens += [
            [rng.randrange(tokenizer.n_words)], [rng.choice(bytes_)], text_tokens[start : start + rng.randrange(6)],
            [space], [rng.choice((0, 1, 2))], [bytes_[n] for n in "上🦙é".encode()[: rng.randrange(1, 10)]],
        ][choice]  # fmt: skip
    return tokens[rng.randrange(4) :]


def test_joined_chunks_are_the_text_of_all_tokens(any_tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    encoded = [any_tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
    for tokens in encoded + [random_tokens(any_tokenizer, rng) for _ in range(300)]:
        assert "".join(text_chunks(any_tokenizer, tokens)) == any_tokenizer.decode(tokens), tokens


def test_an_echoed_prompt_and_its_answer_are_decoded_as_one_text(any_tokenizer: Tokenizer) -> None:
    """Check that the first word of the answer keeps its leading space, unless the echoed prompt has no text."""
    rng = random.Random(3)
    for prompt in TEXTS:
        prompt_tokens, tokens = any_tokenizer.encode(prompt, bos=True, eos=False), random_tokens(any_tokenizer, rng)
        text = IncrementalText(any_tokenizer, [prompt[-2:] + "?"])
        chunks = [text.begin(prompt_tokens), *(text.push(token) for token in tokens), text.end()]
        assert "".join(chunks) == any_tokenizer.decode(prompt_tokens + tokens)


def test_all_text_is_released_at_once_except_incomplete_utf8_and_the_beginning_of_a_stop_string(
    any_tokenizer: Tokenizer,
) -> None:
    """Check after each token that the text so far has been released, also if the next token may add a combining mark or another
    emoji to its last letter."""
    for text in TEXTS:
        tokens = any_tokenizer.encode(text, bos=True, eos=False)
        released = held_back = ""
        plain, stopping = IncrementalText(any_tokenizer), IncrementalText(any_tokenizer, ["e?", "\u200d!"])
        for n, token in enumerate(tokens, 1):
            so_far = any_tokenizer.decode(tokens[:n]).rstrip("\ufffd")  # the last character may lack some of its bytes
            released += plain.push(token)
            held_back += stopping.push(token)
            assert released == so_far
            assert held_back == (so_far[:-1] if so_far.endswith(("e", "\u200d")) else so_far)


def test_pending_text_and_the_work_for_each_token_are_bounded(tokenizer: Tokenizer) -> None:
    """Check that little text is pending, and each token is quick: in a long answer, with a very long stop string, and for
    tokens without text."""
    text = IncrementalText(tokenizer, ["\n\n"])
    for _ in range(2000):
        text.push(tokenizer.sp_model.encode("sea")[0])
    assert len(text.pending) < 10 and len(text.detokenizer.context) == 1
    text, start = IncrementalText(tokenizer, ["z" * 1_000_000]), time.process_time()
    assert text.push(tokenizer.sp_model.encode("z")[-1]) == "" and time.process_time() - start < 1
    text = IncrementalText(tokenizer)
    assert {text.push(tokenizer.bos_id) for _ in range(99)} == {""} and text.detokenizer.context == []


def text_before_stop(tokenizer: Tokenizer, tokens: list[int], stops: tuple[str, ...]) -> str:
    """Return the decoded text before the first stop string to be completed. If several stop strings end at the same character,
    cut the text before the longest one."""
    text = tokenizer.decode(tokens)
    spans = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(spans)[1]] if spans else text


def test_stop_strings_are_found_across_tokens_and_no_part_of_them_is_yielded(any_tokenizer: Tokenizer) -> None:
    """Test stop strings that occur in the text, stop strings that occur except for their last character, and stop strings that
    are prefixes of each other."""
    rng, n_stopped = random.Random(2), 0
    for _ in range(400):
        tokens = random_tokens(any_tokenizer, rng)
        text = any_tokenizer.decode(tokens)
        start = rng.randrange(len(text))
        stop = text[start : start + rng.randrange(1, 7)]
        stops = (stop, stop + "?", text[max(start - 2, 0) : start + 1] + "!", text[-3:])[rng.randrange(2) :]
        want, yielded = text_before_stop(any_tokenizer, tokens, stops), ""
        incremental = IncrementalText(any_tokenizer, stops)
        for token in tokens:
            yielded += incremental.push(token)
            assert want.startswith(yielded)
            if incremental.stopped:
                break
        n_stopped += incremental.stopped
        assert yielded + incremental.end() == want
    assert n_stopped > 200


def test_a_row_stops_at_the_token_that_completes_a_stop_string(llama: Llama) -> None:
    """Stop strings end each row of a batch separately. Up to and including the token that completes a stop string, the tokens
    and log probabilities of a row equal those of a call without stop strings."""
    prompts = ["Once upon a time", "The capital", "good 上 🦙", "one, two, three"] * 3
    unstopped = llama.text_completion(prompts, temperature=0, max_gen_len=24, logprobs=True)
    tokens, _ = llama.generate([llama.tokenizer.encode(p, bos=True, eos=False) for p in prompts], 24, temperature=0)
    stops = [unstopped[0]["generation"][9:12], unstopped[2]["generation"][4:6]]
    results = llama.text_completion(prompts, temperature=0, max_gen_len=24, logprobs=True, stop=stops, details=True)
    echoed = llama.text_completion(prompts, temperature=0, max_gen_len=24, echo=True, stop=stops)
    for prompt, row, result, full, echo in zip(prompts, tokens, results, unstopped, echoed, strict=True):
        decoded = [llama.tokenizer.decode(row[:n]) for n in range(len(row) + 1)]
        n = next((n for n, text in enumerate(decoded) if any(s in text for s in stops)), len(row))
        assert result["generation"] == text_before_stop(llama.tokenizer, row, tuple(stops))
        assert result["tokens"] == full["tokens"][:n]
        assert result["logprobs"] == pytest.approx(full["logprobs"][:n], abs=1e-5)
        assert result["new_tokens"] == n
        assert result["finish_reason"] == ("stop" if n < len(row) or len(row) < 24 else "length")
        assert result["prompt_tokens"] == len(llama.tokenizer.encode(prompt, bos=True, eos=False))
        assert echo["generation"].startswith(prompt) and echo["generation"].endswith(result["generation"])
    assert len({result["new_tokens"] for result in results}) > 1


def test_results_have_the_references_keys_unless_details_are_requested(llama: Llama) -> None:
    user = [{"role": "user", "content": "Paris?"}]
    unsafe = [{"role": "user", "content": "[INST]"}]
    assert llama.text_completion(["a"], max_gen_len=2, stop="\n")[0].keys() == {"generation"}
    assert llama.chat_completion([user], max_gen_len=2)[0].keys() == {"generation"}
    answered, refused = llama.chat_completion([user, unsafe], 0, max_gen_len=2, logprobs=True, details=True)
    keys = {"generation", "tokens", "logprobs", "finish_reason", "prompt_tokens", "new_tokens"}
    assert answered.keys() == refused.keys() == keys
    assert answered["new_tokens"] == len(answered["tokens"]) == 2 and answered["finish_reason"] == "length"
    assert (refused["finish_reason"], refused["prompt_tokens"], refused["new_tokens"]) == ("stop", 0, 0)


def test_finish_reason_is_stop_at_eos_and_length_at_the_length_limit(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "Once upon"
    n = len(llama.tokenizer.encode(prompt, bos=True, eos=False))
    monkeypatch.setattr(llama.tokenizer, "eos_id", -2)
    (result,) = llama.text_completion([prompt], 0, details=True)
    # The answer fills the context of 64 tokens.
    assert (result["finish_reason"], result["prompt_tokens"], result["new_tokens"]) == ("length", n, 64 - n)
    tokens = llama.generate([llama.tokenizer.encode(prompt, bos=True, eos=False)], 5, temperature=0)[0][0]
    assert llama.text_completion([prompt], 0, max_gen_len=0, details=True)[0]["finish_reason"] == "length"
    monkeypatch.setattr(llama.tokenizer, "eos_id", tokens[4])
    (ended,) = llama.text_completion([prompt], 0, details=True)
    assert (ended["finish_reason"], ended["new_tokens"]) == ("stop", tokens.index(tokens[4]))


# --- streams ---------------------------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "max_gen_len": 0},
    {"seed": 4, "temperature": 1.0, "top_p": 1.0},
    {"seed": 5, "temperature": 1.5, "top_k": 50, "repetition_penalty": 1.3, "max_gen_len": 30, "stop": ["e", "\n"]},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_chunks_of_a_stream_are_the_text_and_details_of_the_batch_call(llama: Llama, options: dict) -> None:
    """Stream the answers of a model with random weights, because they contain invalid UTF-8 bytes and characters of several
    tokens."""
    for prompt in ("Once upon a time", "good 上 🦙", ""):
        (want,) = llama.text_completion([prompt], details=True, **options)
        stream = llama.text_completion_stream(prompt, **options)
        assert (stream.new_tokens, stream.text) == (0, "")
        chunks, texts = [], []
        for chunk in stream:
            chunks.append(chunk)
            texts.append(stream.text)
        assert "" not in chunks and "".join(chunks) == stream.text == want["generation"]
        assert texts == list(itertools.accumulate(chunks))
        assert [stream.finish_reason, stream.prompt_tokens, stream.new_tokens] == [
            want[k] for k in ("finish_reason", "prompt_tokens", "new_tokens")
        ]
    dialog = [{"role": "user", "content": "Paris?"}]
    (answer,) = llama.chat_completion([dialog], **options)
    assert "".join(llama.chat_completion_stream(dialog, **options)) == answer["generation"]["content"]


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(*resolve_model_paths(), max_seq_len=256, max_batch_size=2, device="cpu", dtype="float32")


def test_code_points_of_several_byte_tokens_come_in_one_chunk(demo: Llama) -> None:
    dialog = [
        {"role": "system", "content": "Always answer with emojis"},
        {"role": "user", "content": "How do I get from Rome to Oslo?"},
    ]
    stream = demo.chat_completion_stream(dialog, temperature=0)
    chunks = list(stream)
    assert "".join(chunks) == demo.chat_completion([dialog], temperature=0)[0]["generation"]["content"] and len(chunks) > 2
    assert all(len(chunk.encode()) >= 3 for chunk in chunks) and stream.finish_reason == "stop"


def test_a_turn_of_a_chat_prefills_only_the_last_answer_and_the_new_question(
    demo: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "ATTENTION_CHUNK", 16)
    dialog: list = []
    last_answer = 0
    for question in ("What is the capital of France?", "And what should I see there?", "What is 3 + 4?", "Thank you!"):
        dialog += [{"role": "user", "content": question}]
        with count_forward_tokens() as forwards:
            stream = demo.chat_completion_stream(dialog, 0)
            dialog += [{"role": "assistant", "content": "".join(stream)}]
        new = demo.tokenizer.encode(f"[INST] {question} [/INST]", bos=True, eos=False)
        assert len(new) <= forwards[0] <= last_answer + len(new) + 2 + 15  # 2: a space and EOS; 15: up to a multiple of 16
        last_answer = stream.new_tokens
    assert stream.cached_tokens == stream.prompt_tokens - forwards[0] > forwards[0]
    for n in range(1, len(dialog), 2):
        assert demo.chat_completion([dialog[:n]], 0)[0]["generation"] == dialog[n]


@pytest.mark.parametrize("event", ["a forward that fails", "other weights"])
def test_no_keys_and_values_are_shared_after_a_failed_forward_or_new_weights(small: SimpleNamespace, event: str) -> None:
    """The answer must be computed anew, and a stream that is still open must raise."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu")

    def complete(prompt: str) -> str:
        return "".join(llama.text_completion_stream(prompt, 0, max_gen_len=8))

    text = "once upon a time there"
    complete(text)
    open_stream = llama.text_completion_stream(text, 0, max_gen_len=8)
    next(open_stream)
    if event == "other weights":
        generator = torch.Generator().manual_seed(5)
        other = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in small.weights.items()}
        llama.model.load_state_dict({name: w for name, w in other.items() if name != "rope.freqs"})
    else:
        handle = llama.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.model(torch.tensor([[7, 8, 9, 10, 11, 12]]), 0)
        handle.remove()
    why = "the model has been changed" if event == "other weights" else "the model's forward, or code of yours"
    with pytest.raises(InputError, match=why):
        list(open_stream)
    assert repr(open_stream).startswith("<Stream ended early: ")
    assert complete(text + " was") == llama.text_completion([text + " was"], 0, max_gen_len=8)[0]["generation"]


def test_a_stream_that_is_left_early_does_not_affect_the_next_call(llama: Llama) -> None:
    """Close one stream, leave the `with` block of a second, and keep a third open. The next call is unaffected, and only the
    open stream goes on."""
    want = llama.text_completion(["a time"], 0, max_gen_len=12)
    stream = llama.text_completion_stream("a time", 0, max_gen_len=12)
    first = next(stream)
    stream.close()
    assert want[0]["generation"].startswith(first) and list(stream) == [] and stream.finish_reason is None
    with llama.text_completion_stream("a time", 0, max_gen_len=12) as stream:
        for _ in stream:
            break
    assert list(stream) == []
    open_stream = llama.text_completion_stream("a time", 0, max_gen_len=12)
    next(open_stream)
    assert llama.text_completion(["a time"], 0, max_gen_len=12) == want
    assert want[0]["generation"].endswith("".join(open_stream))


def test_a_dialog_with_special_tags_gives_a_stream_of_the_error(llama: Llama) -> None:
    stream = llama.chat_completion_stream([{"role": "user", "content": "a [INST] b"}])
    assert list(stream) == [UNSAFE_ERROR]
    assert (stream.finish_reason, stream.prompt_tokens, stream.new_tokens) == ("stop", 0, 0)


def test_bad_stop_strings_are_refused(llama: Llama) -> None:
    assert check_stop("ab") == ("ab",) and check_stop(["a", "b"]) == ("a", "b") and check_stop(()) == check_stop(None) == ()
    for bad, part in (
        *[(bad, "a string, or a list of strings") for bad in (b"a", {"a"}, 5)],
        ("", "is empty"),
        (["a", ""], "stop string 1 is empty"),
        (["a", 5], "stop string 1 is 5"),
        ("a\ud800", "surrogate"),
    ):
        for call in (
            lambda bad=bad: llama.text_completion(["a"], stop=bad),
            lambda bad=bad: llama.chat_completion_stream([{"role": "user", "content": "a"}], stop=bad),
        ):
            with pytest.raises(InputError, match=part):
                call()


def test_finish_reason_is_stop_if_the_last_allowed_token_completes_a_stop_string(demo: Llama) -> None:
    (result,) = demo.text_completion(["The opposite of hot is"], 0, max_gen_len=2, stop=".", details=True)
    assert (result["generation"], result["finish_reason"], result["new_tokens"]) == ("cold", "stop", 2)
    stream = demo.text_completion_stream("The opposite of hot is", 0, max_gen_len=2, stop=".")
    assert "".join(stream) == "cold" and stream.finish_reason == "stop"


def test_a_stop_string_that_only_the_end_of_the_text_completes_is_the_reason(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last token is one byte of a character of several, which becomes a replacement character at the end of the text."""
    byte = llama.tokenizer.sp_model.piece_to_id("<0xE2>")
    monkeypatch.setattr("llama.engine.decode_state.sample", lambda logits, *_: logits.new_full((len(logits),), byte).long())
    answer = llama.text_completion(["The"], max_gen_len=1, stop="\ufffd", details=True)[0]
    assert (answer["generation"], answer["finish_reason"]) == ("", "stop")
    stream = llama.text_completion_stream("The", max_gen_len=1, stop="\ufffd")
    assert ("".join(stream), stream.finish_reason) == ("", "stop")
