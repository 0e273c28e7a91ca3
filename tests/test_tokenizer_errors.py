"""Tokenizer files that are none, or damaged: one CheckpointError each, when the file is read."""

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llama import CheckpointError, Tokenizer

from .support import TEXT, train_tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return train_tokenizer(tmp_path / "tokenizer.model")


def refuse(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(path)
    assert [part for part in (str(path), *parts) if part not in str(caught.value)] == []


def train(**options: Any) -> bytes:
    model, text = io.BytesIO(), iter(TEXT.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=80, minloglevel=2, **options
    )
    return model.getvalue()


def test_tokenizers_of_other_kinds(path: Path) -> None:
    path.write_text('{"version": "1.0", "model": {}}')
    refuse(path, "it is JSON", "fetch tokenizer.model again")
    path.write_bytes(train(bos_id=-1, eos_id=-1))
    refuse(path, "without BOS and EOS", "not Llama's")


def test_a_shard_in_its_place(path: Path) -> None:
    """Which is not read whole to find that out."""
    with path.open("r+b") as f:
        f.truncate(1 << 40)
    refuse(path, "larger than 16,777,216 bytes", "another file")


def test_an_unknown_piece_of_many_letters(path: Path) -> None:
    path.write_bytes(train(unk_surface="\u0301" * 1000))
    refuse(path, "an unknown id is", "damaged")


def test_a_tokenizer_without_an_unknown_piece(path: Path) -> None:
    """Which sentencepiece loads, until it decodes one."""
    data = bytearray(path.read_bytes())
    data[1] -= 2  # the first piece is shorter, and so has no type any more
    path.write_bytes(data)
    refuse(path, "unknown one", "not Llama's")


@pytest.mark.parametrize("text", ["\u2581the", "what is unknown"])
def test_a_tokenizer_whose_texts_are_no_utf8(path: Path, text: str) -> None:
    """Which sentencepiece loads, until it decodes one; a bit of a piece, or of what an unknown one reads as, is enough."""
    data = train(unk_surface="what is unknown")
    at = data.index(text.encode())
    path.write_bytes(data)
    assert Tokenizer(path).n_words == 80
    path.write_bytes(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])
    refuse(path, "not UTF-8", "fetch tokenizer.model again")
