"""Tokenizers of folders in Hugging Face's layout: the ids of `tokenizers` and of SentencePiece, and control ids only for us."""

import itertools
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama import CheckpointError, InputError, Llama, Tokenizer, convert_checkpoint
from llama.engine.incremental_text import IncrementalText
from llama.engine.requests import GeneratedToken
from llama.hugging_face.load import load_tokenizer_and_chat_format
from llama.hugging_face.tokenizer import HuggingFaceTokenizer
from llama.server.answers import TokenTexts

from .conftest import VOCAB
from .hf_text import added, byte_level_json, llama_json, odd_strings, write
from .hugging_face import write_hugging_face
from .support import assert_raises, random_weights, write_shards

BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
Writer = Callable[..., Path]


@pytest.fixture
def write_folder(small: SimpleNamespace, tmp_path: Path) -> Writer:
    """Return a function that writes the small model with `vocab_size` tokens, and small files as JSON."""

    def write_folder(vocab_size: int = VOCAB, model: bool = False, **files: Any) -> Path:
        params = small.params
        folder = write_hugging_face(tmp_path / "hf", params, random_weights(params, vocab_size, 64), eos_token_id=2)
        if model:
            shutil.copy(small.tokenizer_path, folder / "tokenizer.model")
        return write(folder, **files)

    return write_folder


def load(folder: Path, vocab_size: int = -1) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer_and_chat_format(folder, None, vocab_size).tokenizer
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def build(folder: Path) -> Llama:
    return Llama.build(folder, max_seq_len=64, max_batch_size=2, device="cpu")


# --- Llama's byte pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_and_texts_are_those_of_sentencepiece(
    write_folder: Writer, small: SimpleNamespace, tokenizer: Tokenizer, legacy: bool
) -> None:
    pytest.importorskip("tokenizers")
    ours = load(write_folder(tokenizer=llama_json(small.tokenizer_path, legacy), tokenizer_config=BOS_EOS))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.n_words, ours.begins_with_bos) == (1, 2, -1, VOCAB, True)
    for text in odd_strings(1000):
        tokens = tokenizer.encode(text, bos=True, eos=True)
        assert ours.encode(text, bos=True, eos=True) == tokens, text
        assert ours.encode_infilling(text) == tokenizer.encode_infilling(text), text
        assert ours.decode(tokens) == tokenizer.decode(tokens)
    rng = random.Random(1)
    for _ in range(2000):  # any tokens, also bytes that are no characters
        tokens = [rng.choice([0, 1, rng.randrange(VOCAB), rng.randrange(3, 259)]) for _ in range(rng.randint(0, 7))]
        detokenizer, n = ours.make_detokenizer(), rng.randint(0, len(tokens))
        pieces = detokenizer.begin(tokens[:n]), *map(detokenizer.push, tokens[n:]), detokenizer.end()
        assert ours.decode(tokens) == tokenizer.decode(tokens) == "".join(pieces)
        assert ours.decode_infilling(tokens) == tokenizer.decode_infilling(tokens)


def test_a_model_answers_as_with_tokenizer_model(write_folder: Writer, small: SimpleNamespace) -> None:
    pytest.importorskip("tokenizers")
    folder = write_folder(tokenizer=llama_json(small.tokenizer_path), special_tokens_map=BOS_EOS)
    ours, theirs = build(folder), Llama.build(folder, small.tokenizer_path, 64, 2, device="cpu")
    dialog: Any = [{"role": "system", "content": " s"}, {"role": "user", "content": "q\U0001f600"}]
    for llama in (ours, theirs):
        llama.results = [  # type: ignore[attr-defined]
            llama.text_completion(["The quick", " a"], 0, max_gen_len=9, logprobs=True, top_logprobs=2, echo=True),
            llama.chat_completion([dialog], 0, max_gen_len=9, details=True),
            [*llama.chat_completion_stream(dialog, 0, max_gen_len=9, stop="e")],
            llama.score(["The"], [" quick"]), llama.perplexity("The quick brown"),
        ]  # fmt: skip
    assert ours.results == theirs.results  # type: ignore[attr-defined]


def test_a_folder_that_is_converted_to_metas_layout_keeps_its_tokenizer(write_folder: Writer, tmp_path: Path) -> None:
    folder = write_folder(tokenizer=byte_level_json(), tokenizer_config=CHAT_ML | {"chat_template": "{{ bos_token }}x"})
    back = convert_checkpoint(folder, tmp_path / "meta", "meta")
    dialog: Any = [{"role": "user", "content": "a"}]
    tokens = build(folder).encode_dialog(dialog)
    assert tokens[0] == 1 and build(back).encode_dialog(dialog) == tokens


def test_a_folder_that_is_converted_from_metas_layout_keeps_its_tokens(small: SimpleNamespace, tmp_path: Path) -> None:
    params = small.params | {"vocab_size": VOCAB + 1}
    folder = write_shards(tmp_path / "meta", params, random_weights(params, VOCAB + 1, 192))
    shutil.copy(small.tokenizer_path, folder / "tokenizer.model")
    write(folder, added_tokens={"<b>": VOCAB})
    tokens = build(folder).tokenizer.encode("a<b>fox", bos=False, eos=False)
    converted = convert_checkpoint(folder, tmp_path / "theirs", "hf")
    assert VOCAB in tokens and build(converted).tokenizer.encode("a<b>fox", bos=False, eos=False) == tokens


# --- added and special tokens ------------------------------------------------------------------------------------------

MORE = (added(VOCAB, "<|a|>", special=True), added(VOCAB + 1, "<b>"), added(VOCAB + 2, "<bb>", rstrip=True),
        added(VOCAB + 3, "cat", single_word=True), added(VOCAB + 4, "<l>", lstrip=True))  # fmt: skip


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_are_found_in_texts_as_tokenizers_does_and_special_ones_are_not(
    write_folder: Writer, small: SimpleNamespace, legacy: bool
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    values = llama_json(small.tokenizer_path, legacy, MORE)
    ours = load(write_folder(VOCAB + 8, tokenizer=values, tokenizer_config=BOS_EOS))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(values))
    theirs.encode_special_tokens = True
    rng = random.Random(2)
    for _ in range(500):
        text = "a" + "".join(rng.choices(["<|a|>", "<b>", "<bb>", "cat", "<l>", " ", "  ", "x", "<", "b>", "</s>"], k=7))
        assert ours.encode(text, bos=False, eos=False) == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.n_words == VOCAB + 5 and ours.decode([VOCAB, VOCAB + 1, VOCAB + 3]) == "<b>cat"
    special = [ours.special_finder.tokens[0], "x", *ours.special_finder.split("</s><|a|>")]
    assert {t.id for t in special if not isinstance(t, str)} <= {0, 1, 2, VOCAB}


@pytest.mark.parametrize("where", ["added_tokens", "added_tokens_decoder"])
def test_added_tokens_beside_a_tokenizer_model(write_folder: Writer, tokenizer: Tokenizer, where: str) -> None:
    config: dict[str, Any] = BOS_EOS | {"additional_special_tokens": ["<|a|>"], "legacy": False}
    files: dict[str, Any] = {"added_tokens": {"<|a|>": VOCAB, "<b>": VOCAB + 1}}
    if where == "added_tokens_decoder":
        decoder = {str(VOCAB): {"content": "<|a|>", "special": True}, str(VOCAB + 1): {"content": "<b>"}}
        files, config = {}, BOS_EOS | {"added_tokens_decoder": decoder, "legacy": False}
    llama = build(write_folder(VOCAB + 2, model=True, tokenizer_config=config, **files))
    ours = llama.tokenizer
    plain = tokenizer.encode("the <|a|>", bos=False, eos=False)
    assert ours.encode("the <|a|><b> fox", False, False) == [*plain, VOCAB + 1, *tokenizer.encode_infilling(" fox")]
    for text in odd_strings(300):
        assert ours.encode(text, True, False) == tokenizer.encode(text, True, False)
        assert ours.decode(ours.encode(text, True, False)) == tokenizer.decode(tokenizer.encode(text, True, False))
    assert ours.decode([*plain, VOCAB, VOCAB + 1]) == "the <|a|><b>"
    assert llama.generate([[1, VOCAB + 1]], 3, temperature=0)[0]


def test_added_tokens_beyond_the_models_vocabulary_are_left_out(
    write_folder: Writer, small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_metas_layout = tmp_path / "meta"
    shutil.copytree(small.folder, in_metas_layout)
    shutil.copy(small.tokenizer_path, in_metas_layout / "tokenizer.model")
    (in_metas_layout / "added_tokens.json").write_text(json.dumps({"[PAD]": VOCAB}))
    for folder in (write_folder(model=True, added_tokens={"[PAD]": VOCAB}), in_metas_layout):
        llama = build(folder)
        assert type(llama.tokenizer) is Tokenizer and llama.tokenizer.n_words == VOCAB
        assert "added tokens beyond the model's vocabulary of 384 are left out: ['[PAD]']" in capsys.readouterr().err


def test_tokenizer_json_goes_before_a_smaller_tokenizer_model(write_folder: Writer, small: SimpleNamespace) -> None:
    pytest.importorskip("tokenizers")
    values = llama_json(small.tokenizer_path)
    values["model"]["vocab"]["qu" * 3] = VOCAB  # a vocabulary that has been trained further
    folder = write_folder(VOCAB + 1, model=True, tokenizer=values, tokenizer_config=BOS_EOS)
    assert load(folder, VOCAB + 1).n_words == VOCAB + 1
    assert type(load_tokenizer_and_chat_format(folder, None, VOCAB).tokenizer) is Tokenizer


# --- byte-level vocabularies -------------------------------------------------------------------------------------------

CHAT_ML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<end>"}


def test_byte_level_tokens_and_texts_are_those_of_tokenizers(write_folder: Writer) -> None:
    values = byte_level_json()
    ours = load(write_folder(tokenizer=values, tokenizer_config=CHAT_ML))
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(values))
    theirs.encode_special_tokens = True
    assert (ours.bos_id, ours.eos_id, ours.begins_with_bos) == (1, 2, False)
    for text in odd_strings(1000):
        tokens = ours.encode(text, bos=False, eos=False)
        assert tokens == theirs.encode(text, add_special_tokens=False).ids and ours.decode(tokens) == text
    rng, letters = random.Random(1), ours.encode("\U0001f600\u65e5e\u0301", False, False)
    for _ in range(2000):
        tokens = [rng.choice([rng.randrange(3, VOCAB), *letters]) for _ in range(rng.randint(0, 9))]
        detokenizer = ours.make_detokenizer()
        pieces = [*map(detokenizer.push, tokens), detokenizer.end()]
        assert ours.decode(tokens) == theirs.decode(tokens) == "".join(pieces)


def test_streams_of_a_byte_level_model_have_whole_characters_and_stop_strings(write_folder: Writer) -> None:
    llama = build(write_folder(tokenizer=byte_level_json(), tokenizer_config=CHAT_ML))
    text = IncrementalText(llama.tokenizer, ["\u65e5!"])
    tokens = llama.tokenizer.encode(" a\U0001f600 \u65e5\u672c\u65e5!x", False, False)
    pieces = [text.push(token) for token in tokens]
    assert "".join(pieces) == " a\U0001f600 \u65e5\u672c" and text.stopped and "\ufffd" not in "".join(pieces)
    assert llama.text_completion(["The"], 0, max_gen_len=5, echo=True)[0]["generation"].startswith("The")
    assert llama.text_completion([""], 0, max_gen_len=2, details=True)[0]["prompt_tokens"] == 1  # BOS
    texts = TokenTexts(llama.tokenizer, [])
    scored = [texts.push(GeneratedToken(0, token, -1.0)) for token in tokens]
    assert b"".join(each.bytes for each in scored).decode() == " a\U0001f600 \u65e5\u672c\u65e5!x"
    assert any(each.text.startswith("bytes:\\x") for each in scored)


# --- ends of answers ---------------------------------------------------------------------------------------------------


def test_an_answer_ends_at_each_token_that_generation_config_names(
    write_folder: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(model=True)
    llama = build(folder)
    prompt, tokens = [[1, 70, 80]], llama.generate([[1, 70, 80]], 12, temperature=0)[0][0]
    end = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    write(folder, generation_config={"eos_token_id": [2, tokens[end]]})
    ended = build(folder)
    assert ended.tokenizer.more_eos_ids == (tokens[end],)
    assert ended.generate(prompt, 12, temperature=0)[0][0] == tokens[:end]
    (answer,) = ended.text_completion(prompt, 0, max_gen_len=12, details=True)
    assert (answer["finish_reason"], answer["new_tokens"]) == ("stop", end)
    assert ended.generate(prompt, 12, temperature=0, ignore_eos=True)[0][0] == tokens
    assert ended.generate(prompt, 12, temperature=0, stop_token=tokens[0])[0][0] == []
    assert len(ended.generate(prompt, 12, temperature=0, min_new_tokens=end + 1)[0][0]) > end


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, ["its model is 'Unigram'", "supported is 'BPE'"]),
        ({"model": {"type": "BPE", "vocab": {"a": 1.5}, "merges": []}}, ["not an integer from 0"]),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "x"]]}}, ["cannot read it"]),
        ({"pre_tokenizer": {"type": "BertPreTokenizer"}}, ["its pre_tokenizer is BertPreTokenizer"]),
        ({"added_tokens": [{"id": "x", "content": "y"}]}, ["the added token 'x'", "must have an id, an integer"]),
        ({"added_tokens": [added(2, "</s>"), added(5, "</s>")]}, ["'</s>' has the ids 2 and 5"]),
        ({"added_tokens": [added(9_000_000, "</s>")]}, ["most are missing"]),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_refused(
    write_folder: Writer, small: SimpleNamespace, change: dict[str, Any], parts: list[str]
) -> None:
    pytest.importorskip("tokenizers")
    folder = write_folder(tokenizer=llama_json(small.tokenizer_path) | change, tokenizer_config=BOS_EOS)
    assert_raises(lambda: load(folder), CheckpointError, "tokenizer.json", *parts)


def test_missing_packages_and_settings_are_named(
    write_folder: Writer, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tokenizer=llama_json(small.tokenizer_path))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        assert_raises(lambda: build(folder), CheckpointError, "pip install tokenizers")
    write(folder, config=json.loads((folder / "config.json").read_text()) | {"eos_token_id": "2"})
    assert_raises(lambda: build(folder), CheckpointError, "config.json: eos_token_id has '2'")
    write(folder, tokenizer_config={"eos_token": 3})
    assert_raises(lambda: build(folder), CheckpointError, "tokenizer_config.json: eos_token is 3")


def test_texts_and_tokens_are_checked_as_by_the_other_tokenizer(write_folder: Writer, small: SimpleNamespace) -> None:
    pytest.importorskip("tokenizers")
    ours = load(write_folder(tokenizer=llama_json(small.tokenizer_path), tokenizer_config=BOS_EOS))
    for call, part in itertools.chain(
        [(lambda: ours.encode("\ud800", True, False), "lone surrogate"), (lambda: ours.decode([VOCAB]), "out of range")],
        [(lambda: ours.encode(b"a", True, False), "must be a string"), (lambda: ours.decode("a"), "whole numbers")],  # type: ignore[arg-type]
    ):
        assert_raises(call, InputError, part)
