"""Test that files that are damaged, or are not a tokenizer, raise CheckpointError when they are loaded."""

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


def assert_refused(path: Path, *parts: str) -> None:
    """Check that loading a tokenizer from `path` raises CheckpointError, and that the message contains the path and all
    `parts`."""
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(path)
    assert [part for part in (str(path), *parts) if part not in str(caught.value)] == []


def train(**options: Any) -> bytes:
    """Train a small SentencePiece model with the given options of the trainer. Return the bytes of the model file."""
    model, text = io.BytesIO(), iter(TEXT.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, vocab_size=80, minloglevel=2, **options
    )
    return model.getvalue()


def test_json_and_tokenizers_without_bos_and_eos_are_refused(path: Path) -> None:
    path.write_text('{"version": "1.0", "model": {}}')
    assert_refused(path, "it is JSON", "fetch tokenizer.model again")
    path.write_bytes(train(bos_id=-1, eos_id=-1))
    assert_refused(path, "without BOS and EOS", "not Llama's")


def test_a_file_of_a_shards_size_is_refused_without_reading_it(path: Path) -> None:
    with path.open("r+b") as f:
        f.truncate(1 << 40)
    assert_refused(path, "larger than 16,777,216 bytes", "another file")


def test_an_unknown_piece_with_a_very_long_text_is_refused(path: Path) -> None:
    path.write_bytes(train(unk_surface="\u0301" * 1000))
    assert_refused(path, "the unknown piece has", "damaged")


def test_a_tokenizer_without_an_unknown_piece_is_refused(path: Path) -> None:
    """Write a tokenizer file without an unknown piece. Sentencepiece would load the file, and fail only when it decodes an
    unknown token."""
    data = bytearray(path.read_bytes())
    data[1] -= 2  # remove the type of the first piece, so that it is no longer the unknown piece
    path.write_bytes(data)
    assert_refused(path, "unknown piece", "not Llama's")


@pytest.mark.parametrize("text", ["\u2581the", "what is unknown"])
def test_a_tokenizer_with_text_that_is_not_utf_8_is_refused(path: Path, text: str) -> None:
    """Flip one bit in a piece, or in the text of the unknown piece. Sentencepiece would load the damaged file, and fail only
    when it decodes the piece."""
    data = train(unk_surface="what is unknown")
    index = data.index(text.encode())
    path.write_bytes(data)
    assert Tokenizer(path).n_words == 80
    path.write_bytes(data[:index] + bytes([data[index] ^ 0x80]) + data[index + 1 :])
    assert_refused(path, "not UTF-8", "fetch tokenizer.model again")
