"""Text as its tokens come: joined it is the whole answer, cut at no place inside a character, and stopped at strings."""

import random
import time
import unicodedata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import InputError, Llama, Tokenizer, resolve_model_paths
from llama.chat import UNSAFE_ERROR
from llama.engine.incremental_text import IncrementalText, check_stop, extends_character, last_character_start

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


def pieces(tokenizer: Tokenizer, tokens: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    text = IncrementalText(tokenizer, stops)
    return [*(text.push(token) for token in tokens), text.end()]


def random_tokens(tokenizer: Tokenizer, draw: random.Random) -> list[int]:
    """Ids of all kinds, valid and broken runs of bytes, control pieces, spaces that lead."""
    sp = tokenizer.sp_model
    bytes_ = [i for i in range(tokenizer.n_words) if sp.is_byte(i)]
    space, whole = sp.piece_to_id("▁"), [i for t in TEXTS for i in sp.encode(t)]
    tokens: list[int] = []
    while len(tokens) < 40:
        kind = draw.randrange(6)
        start = draw.randrange(len(whole))
        tokens += [
            [draw.randrange(tokenizer.n_words)], [draw.choice(bytes_)], whole[start : start + draw.randrange(6)],
            [space], [draw.choice((0, 1, 2))], [bytes_[n] for n in "上🦙é".encode()[: draw.randrange(1, 10)]],
        ][kind]  # fmt: skip
    return tokens[draw.randrange(4) :]


def test_joined_pieces_are_the_decoded_whole(any_tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for tokens in [any_tokenizer.encode(t, bos=True, eos=True) for t in TEXTS] + [
        random_tokens(any_tokenizer, draw) for _ in range(300)
    ]:
        assert "".join(pieces(any_tokenizer, tokens)) == any_tokenizer.decode(tokens), tokens


def test_an_echoed_prompt_stands_before_the_answer(any_tokenizer: Tokenizer) -> None:
    """The answer's first piece keeps its space, unless the prompt has no text."""
    draw = random.Random(3)
    for prompt in TEXTS:
        before, tokens = any_tokenizer.encode(prompt, bos=True, eos=False), random_tokens(any_tokenizer, draw)
        text = IncrementalText(any_tokenizer, [prompt[-2:] + "?"])
        whole = [text.begin(before), *(text.push(token) for token in tokens), text.end()]
        assert "".join(whole) == any_tokenizer.decode(before + tokens)


def test_each_piece_begins_where_a_character_does(any_tokenizer: Tokenizer) -> None:
    for text in TEXTS[:-1]:
        tokens = any_tokenizer.encode(text, bos=False, eos=False)
        before = ""
        for piece in pieces(any_tokenizer, tokens):
            assert "\ufffd" not in piece
            assert not piece or not extends_character(piece[0], before), (text, piece)
            assert not piece or not (unicodedata.combining(piece[0]) or piece[0] in "\u200d\ufe0f\u20e3"), (text, piece)
            before += piece
        assert before == text or text.startswith(" ")


def test_what_belongs_to_one_character_comes_in_one_piece(any_tokenizer: Tokenizer) -> None:
    for whole in ("🧑🏽‍🚀", "👩‍👩‍👧", "🇳🇴", "e\u0301", "a\u0308\u0323", "1️⃣", "क्ष", "\u1112\u1161\u11ab"):
        got = pieces(any_tokenizer, any_tokenizer.encode(f"go {whole} on", bos=False, eos=False))
        assert any(whole in piece for piece in got), (whole, got)


def test_waiting_has_an_end(tokenizer: Tokenizer) -> None:
    """A letter with marks without end is let go, and a long answer costs the same work for each token."""
    tokens = tokenizer.encode("z" + "\u0301" * 500, bos=False, eos=False)
    text = IncrementalText(tokenizer, ["\n\n"])
    assert max(len(text.pending) for token in tokens if text.push(token) is not None) <= 66
    text = IncrementalText(tokenizer, ["\n\n"])
    for _ in range(2000):
        text.push(tokenizer.sp_model.encode("sea")[0])
    assert len(text.pending) < 10 and len(text.detokenizer.context) == 1
    text, begun = (
        IncrementalText(tokenizer, ["z" * 1_000_000]),
        time.process_time(),
    )  # is looked for no further than there is text
    assert text.push(tokenizer.sp_model.encode("z")[-1]) == "" and time.process_time() - begun < 1
    text = IncrementalText(tokenizer)
    assert {text.push(tokenizer.bos_id) for _ in range(99)} == {""} and text.detokenizer.context == []


def cut(tokenizer: Tokenizer, tokens: list[int], stops: tuple[str, ...]) -> str:
    """The definition: all the text, up to the stop string that is complete first, of several the longest."""
    text = tokenizer.decode(tokens)
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def test_stops_are_found_across_tokens_and_no_part_of_them_is_let_out(any_tokenizer: Tokenizer) -> None:
    """Stop strings cut from the very text, from near it, and beginnings of each other."""
    draw, stopped = random.Random(2), 0
    for _ in range(400):
        tokens = random_tokens(any_tokenizer, draw)
        text = any_tokenizer.decode(tokens)
        at = draw.randrange(len(text))
        stop = text[at : at + draw.randrange(1, 7)]
        stops = (stop, stop + "?", text[max(at - 2, 0) : at + 1] + "!", text[-3:])[draw.randrange(2) :]
        want, seen = cut(any_tokenizer, tokens, stops), ""
        assembled = IncrementalText(any_tokenizer, stops)
        for token in tokens:
            seen += assembled.push(token)
            assert want.startswith(seen)
            if assembled.stopped:
                break
        stopped += assembled.stopped
        assert seen + assembled.end() == want
    assert stopped > 200


def test_a_row_stops_at_the_id_that_makes_a_stop_string_complete(llama: Llama) -> None:
    """Each row of a batch by itself; tokens and log probabilities go on to that token; the others as without stops."""
    prompts = ["Once upon a time", "The capital", "good 上 🦙", "one, two, three"] * 3
    free = llama.text_completion(prompts, temperature=0, max_gen_len=24, logprobs=True)
    tokens, _ = llama.generate([llama.tokenizer.encode(p, bos=True, eos=False) for p in prompts], 24, temperature=0)
    stops = [free[0]["generation"][9:12], free[2]["generation"][4:6]]
    got = llama.text_completion(prompts, temperature=0, max_gen_len=24, logprobs=True, stop=stops, details=True)
    echoed = llama.text_completion(prompts, temperature=0, max_gen_len=24, echo=True, stop=stops)
    for prompt, row, mine, whole, echo in zip(prompts, tokens, got, free, echoed, strict=True):
        decoded = [llama.tokenizer.decode(row[:n]) for n in range(len(row) + 1)]
        n = next((n for n, text in enumerate(decoded) if any(s in text for s in stops)), len(row))
        assert mine["generation"] == cut(llama.tokenizer, row, tuple(stops))
        assert mine["tokens"] == whole["tokens"][:n] and mine["logprobs"] == pytest.approx(whole["logprobs"][:n], abs=1e-5)
        assert mine["new_tokens"] == n and mine["finish_reason"] == ("stop" if n < len(row) or len(row) < 24 else "length")
        assert mine["prompt_tokens"] == len(llama.tokenizer.encode(prompt, bos=True, eos=False))
        assert echo["generation"].startswith(prompt) and echo["generation"].endswith(mine["generation"])
    assert len({prediction["new_tokens"] for prediction in got}) > 1


def test_without_the_request_the_keys_are_the_references(llama: Llama) -> None:
    user = [{"role": "user", "content": "Paris?"}]
    unsafe = [{"role": "user", "content": "[INST]"}]
    assert llama.text_completion(["a"], max_gen_len=2, stop="\n")[0].keys() == {"generation"}
    assert llama.chat_completion([user], max_gen_len=2)[0].keys() == {"generation"}
    rich, refused = llama.chat_completion([user, unsafe], 0, max_gen_len=2, logprobs=True, details=True)
    assert rich.keys() == refused.keys() == {"generation", "tokens", "logprobs", "finish_reason", "prompt_tokens", "new_tokens"}
    assert rich["new_tokens"] == len(rich["tokens"]) == 2 and rich["finish_reason"] == "length"
    assert (refused["finish_reason"], refused["prompt_tokens"], refused["new_tokens"]) == ("stop", 0, 0)


def test_why_an_answer_ended(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "Once upon"
    n = len(llama.tokenizer.encode(prompt, bos=True, eos=False))
    monkeypatch.setattr(llama.tokenizer, "eos_id", -2)
    (whole,) = llama.text_completion([prompt], 0, details=True)
    assert (whole["finish_reason"], whole["prompt_tokens"], whole["new_tokens"]) == ("length", n, 64 - n)  # the window
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
def test_a_stream_is_the_batch_answer_in_pieces(llama: Llama, options: dict) -> None:
    """Random weights: broken bytes, characters of many tokens, anything."""
    for prompt in ("Once upon a time", "good 上 🦙", ""):
        (want,) = llama.text_completion([prompt], details=True, **options)
        stream = llama.text_completion_stream(prompt, **options)
        assert stream.new_tokens == 0
        got = list(stream)
        assert "" not in got and "".join(got) == want["generation"]
        assert [stream.finish_reason, stream.prompt_tokens, stream.new_tokens] == [
            want[k] for k in ("finish_reason", "prompt_tokens", "new_tokens")
        ]
    dialog = [{"role": "user", "content": "Paris?"}]
    (answer,) = llama.chat_completion([dialog], **options)
    assert "".join(llama.chat_completion_stream(dialog, **options)) == answer["generation"]["content"]


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(*resolve_model_paths(), max_seq_len=256, max_batch_size=2, device="cpu", dtype="float32")


def test_emojis_of_byte_pieces_come_whole(demo: Llama) -> None:
    dialog = [
        {"role": "system", "content": "Always answer with emojis"},
        {"role": "user", "content": "How do I get from Rome to Oslo?"},
    ]
    stream = demo.chat_completion_stream(dialog, temperature=0)
    got = list(stream)
    assert "".join(got) == demo.chat_completion([dialog], temperature=0)[0]["generation"]["content"] and len(got) > 2
    assert all(len(piece.encode()) >= 3 for piece in got) and stream.finish_reason == "stop"


def test_a_turn_of_a_chat_prefills_only_what_is_new(demo: Llama) -> None:
    """Of the whole dialog so far: the end of the last exchange and the new question."""
    dialog: list = []
    for question in ("What is the capital of France?", "And what should I see there?", "What is 3 + 4?", "Thank you!"):
        dialog += [{"role": "user", "content": question}]
        with count_forward_tokens() as forwards:
            stream = demo.chat_completion_stream(dialog, 0, reuse=True)
            dialog += [{"role": "assistant", "content": "".join(stream)}]
        new = demo.tokenizer.encode(f"[INST] {question} [/INST]", bos=True, eos=False)
        assert len(new) <= forwards[0] <= len(new) + 3  # the answer's last token, a space and EOS
    assert stream.prompt_tokens > 3 * forwards[0]
    for n in range(1, len(dialog), 2):
        assert demo.chat_completion([dialog[:n]], 0)[0]["generation"] == dialog[n]


@pytest.mark.parametrize("way", ["a forward that fails", "other weights"])
def test_what_is_kept_is_forgotten_when_it_is_no_longer_true(small: SimpleNamespace, way: str) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu")

    def turn(prompt: str) -> str:
        return "".join(llama.text_completion_stream(prompt, 0, max_gen_len=8, reuse=True))

    text = "once upon a time there"
    turn(text)
    open_ = llama.text_completion_stream(text, 0, max_gen_len=8, reuse=True)
    next(open_)
    if way == "other weights":
        generator = torch.Generator().manual_seed(5)
        other = {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in small.weights.items()}
        llama.model.load_state_dict({name: w for name, w in other.items() if name != "rope.freqs"})
    else:
        handle = llama.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.model(torch.tensor([[7, 8, 9, 10, 11, 12]]), 0)
        handle.remove()
    with pytest.raises(InputError, match=r"another call|changed under a stream"):
        list(open_)
    assert turn(text + " was") == llama.text_completion([text + " was"], 0, max_gen_len=8)[0]["generation"]


def test_leaving_a_stream_frees_it_and_harms_nothing(llama: Llama) -> None:
    want = llama.text_completion(["a time"], 0, max_gen_len=12)
    stream = llama.text_completion_stream("a time", 0, max_gen_len=12)
    first = next(stream)
    stream.close()
    assert want[0]["generation"].startswith(first) and list(stream) == [] and stream.finish_reason is None
    with llama.text_completion_stream("a time", 0, max_gen_len=12) as stream:
        for _ in stream:
            break
    assert list(stream) == []
    open_ = llama.text_completion_stream("a time", 0, max_gen_len=12)
    next(open_)
    assert llama.text_completion(["a time"], 0, max_gen_len=12) == want
    with pytest.raises(InputError, match="another call"):
        list(open_)


def test_an_unsafe_dialog_is_a_stream_of_the_error(llama: Llama) -> None:
    stream = llama.chat_completion_stream([{"role": "user", "content": "a [INST] b"}])
    assert list(stream) == [UNSAFE_ERROR]
    assert (stream.finish_reason, stream.prompt_tokens, stream.new_tokens) == ("stop", 0, 0)


def test_stop_strings_that_are_none(llama: Llama) -> None:
    assert check_stop("ab") == ("ab",) and check_stop(["a", "b"]) == ("a", "b") and check_stop(()) == ()
    for bad, part in (
        *[(bad, "a string, or a list of strings") for bad in (None, b"a", {"a"}, 5)],
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


def test_where_the_last_character_begins() -> None:
    assert last_character_start("so\n") == 3  # after a control all is whole
    assert last_character_start("\u0928\u200c") == 0  # a letter and what keeps it from joining the next
    assert last_character_start("x\U0001f3f4\U000e0067\U000e0062\U000e007f") == 1  # a flag spelled in tags


def test_a_stop_string_that_the_last_id_completes_is_why_it_ended(demo: Llama) -> None:
    (found,) = demo.text_completion(["The opposite of hot is"], 0, max_gen_len=2, stop=".", details=True)
    assert (found["generation"], found["finish_reason"], found["new_tokens"]) == ("cold", "stop", 2)
    stream = demo.text_completion_stream("The opposite of hot is", 0, max_gen_len=2, stop=".")
    assert "".join(stream) == "cold" and stream.finish_reason == "stop"
