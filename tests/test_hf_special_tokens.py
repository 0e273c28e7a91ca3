"""Tokens that end answers, or that a template writes: control tokens, whatever the vocabulary has them as."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama import CheckpointError, InputError, Llama, convert_checkpoint
from llama.cli.main import main
from llama.hugging_face.load import find_chat_format, load_tokenizer_and_chat_format
from llama.hugging_face.tokenizer import HuggingFaceTokenizer

from .conftest import VOCAB
from .hf_text import llama_json, write
from .hugging_face import write_hugging_face
from .support import assert_raises, random_weights, train_tokenizer

CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "legacy": False}
CHAT_ML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def test_symbols_of_sentencepiece_that_end_answers_or_that_the_template_writes_are_control_tokens(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.model", VOCAB, pieces=["<|im_start|>", "<|im_end|>"])
    (tmp_path / "model.safetensors").touch()
    write(tmp_path, config={}, generation_config={"eos_token_id": [2, 4]}, tokenizer_config=CONFIG | {"chat_template": CHAT_ML})
    tokenizer, chat_format, _ = load_tokenizer_and_chat_format(tmp_path, None, VOCAB)
    assert tokenizer.more_eos_ids == (4,) and tokenizer.is_control(3) and tokenizer.is_control(4)
    text = "a<|im_end|>b<|im_start|>"
    tokens = tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(tokens) == text and not {3, 4} & {*tokens} and tokenizer.decode([3, 4]) == ""
    pytest.importorskip("jinja2")
    tokens = chat_format.encode(tokenizer, [{"role": "user", "content": text}])
    assert (tokens.count(3), tokens.count(4)) == (1, 1)


def test_an_end_without_a_template_is_a_control_token(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.model", VOCAB, pieces=["<|im_end|>"])
    (tmp_path / "model.safetensors").touch()
    write(tmp_path, config={"eos_token_id": [2, 3]})
    tokenizer = load_tokenizer_and_chat_format(tmp_path, None, VOCAB).tokenizer
    assert 3 not in tokenizer.encode("<|im_end|>", bos=True, eos=False) and tokenizer.is_control(3)


def test_merged_pieces_that_end_answers_are_control_tokens(small: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    values = llama_json(Path(small.tokenizer_path))
    vocab, merges = values["model"]["vocab"], values["model"]["merges"]
    vocab |= {"zq": VOCAB, "zqz": VOCAB + 1, "\u2581zq": VOCAB + 2}
    merges += [("z", "q"), ("zq", "z"), ("\u2581", "zq")]
    (tmp_path / "model.safetensors").touch()
    write(tmp_path, config={"eos_token_id": [2, VOCAB + 1, VOCAB + 2]}, tokenizer=values, tokenizer_config=CONFIG)
    tokenizer = load_tokenizer_and_chat_format(tmp_path, None, VOCAB + 3).tokenizer
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.more_eos_ids == (VOCAB + 1, VOCAB + 2)
    for text in ("zqz", "a zqz zq", "zq", "zqa"):
        tokens = tokenizer.encode(text, bos=True, eos=False)
        assert not {VOCAB + 1, VOCAB + 2} & {*tokens} and tokenizer.decode(tokens) == text


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_folder_converted_to_metas_layout_keeps_template_added_tokens_and_ends(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    pytest.importorskip("jinja2")
    start, end = VOCAB, VOCAB + 1
    folder = write_hugging_face(
        tmp_path / "hf",
        small.params,
        random_weights(small.params, VOCAB + 2, 64),
        eos_token_id=2 if "gen" in where else [2, end],
    )
    shutil.copy(small.tokenizer_path, folder / "tokenizer.model")
    tokens = {str(start): {"content": "<|im_start|>", "special": True}, str(end): {"content": "<|im_end|>", "special": True}}
    write(folder, tokenizer_config=CONFIG | {"chat_template": CHAT_ML, "added_tokens_decoder": tokens})
    if where == "generation_config.json":
        write(folder, generation_config={"eos_token_id": [2, end], "top_p": 0.9})
    meta = convert_checkpoint(folder, tmp_path / "meta", "meta")
    back = convert_checkpoint(meta, tmp_path / "back", "hf")
    dialog: Any = [{"role": "user", "content": "[INST] hi"}]
    want = Llama.build(folder, max_seq_len=64, max_batch_size=1, device="cpu")
    for other in (meta, back):
        llama = Llama.build(other, max_seq_len=64, max_batch_size=1, device="cpu")
        assert llama.encode_dialog(dialog) == want.encode_dialog(dialog) and llama.tokenizer.more_eos_ids == (end,)
        assert find_chat_format(other).name == f"the template of {other / 'tokenizer_config.json'}"
        assert main(["info", str(other)]) == 0 and "ChatML" in capsys.readouterr().out
    (tmp_path / "lines.jsonl").write_text(json.dumps({"messages": dialog}))
    options = ["--ckpt_dir", str(meta), "--max_seq_len", "64", "--max_gen_len", "2", "--device", "cpu"]
    assert main(["complete", *options, "--jsonl", str(tmp_path / "lines.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(want.encode_dialog(dialog))


@pytest.mark.parametrize("id_", [99999, -1])
def test_ids_that_are_no_tokens_are_ignored_with_a_note(small: SimpleNamespace, tmp_path: Path, id_: int) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "model.safetensors").touch()
    write(tmp_path, tokenizer=llama_json(Path(small.tokenizer_path)), config={"bos_token_id": id_, "eos_token_id": [id_, 2]})
    tokenizer, _, notes = load_tokenizer_and_chat_format(tmp_path, None, VOCAB)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.more_eos_ids) == (2, 2, ())
    assert [f"{key} {id_:,} of" in note for key, note in zip(("bos_token_id", "eos_token_id"), notes, strict=True)] == [
        True
    ] * 2
    for ids in ([-1], [10**6]):
        assert_raises(lambda: tokenizer.decode_infilling(ids), InputError, "out of range")  # noqa: B023


@pytest.mark.parametrize("value", [5, "abc", True])
def test_special_tokens_that_are_no_list_are_refused(small: SimpleNamespace, tmp_path: Path, value: object) -> None:
    shutil.copy(small.tokenizer_path, tmp_path / "tokenizer.model")
    (tmp_path / "model.safetensors").touch()
    write(tmp_path, config={}, tokenizer_config={"additional_special_tokens": value})
    assert_raises(lambda: load_tokenizer_and_chat_format(tmp_path, None, VOCAB), CheckpointError, "must be a list of texts")


def test_a_single_character_that_ends_answers_stays_text(small: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copy(small.tokenizer_path, tmp_path / "tokenizer.model")
    (tmp_path / "model.safetensors").touch()
    write(tmp_path, config={"eos_token_id": [2, 13]})  # 13: the byte of a line end
    tokenizer = load_tokenizer_and_chat_format(tmp_path, None, VOCAB).tokenizer
    assert tokenizer.more_eos_ids == (13,) and tokenizer.decode(tokenizer.encode("a\nb", bos=True, eos=False)) == "a\nb"
