"""Text to ids and back, by SentencePiece."""

import os
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .errors import CheckpointError, InputError, what_is_it


class Tokenizer:
    """A SentencePiece model. Llama 2's has 32,000 pieces, BOS 1, EOS 2 and no padding piece (`pad_id` -1)."""

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such tokenizer file; it is Meta's tokenizer.model, beside the model folders")
        data = path.read_bytes()
        try:
            self.sp_model = SentencePieceProcessor()
            self.sp_model.LoadFromSerializedProto(data)
            self.n_words: int = self.sp_model.vocab_size()
        except Exception as e:  # sentencepiece raises RuntimeError and others by version
            found = what_is_it(data[:64])
            raise CheckpointError(f"{path}: not a SentencePiece model ({found}); fetch tokenizer.model again") from e
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if self.n_words < 1 or self.bos_id < 0 or self.eos_id < 0:
            raise CheckpointError(f"{path}: a SentencePiece model without BOS and EOS pieces is not Llama's")

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, after BOS and before EOS where asked for. Control pieces in the text are plain text."""
        if not isinstance(s, str):
            raise InputError(f"the text to encode must be a string, not {type(s).__name__}")
        try:
            ids = self.sp_model.encode(s)
        except UnicodeEncodeError as e:
            raise InputError(f"the text holds a lone surrogate ({s[e.start]!r} at {e.start}), which is no character") from e
        return [self.bos_id] * bool(bos) + ids + [self.eos_id] * bool(eos)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; BOS and EOS have none."""
        for i in ids:
            if not 0 <= i < self.n_words:
                raise InputError(f"token id {i} is out of range: this tokenizer has {self.n_words} pieces")
        return self.sp_model.decode(list(ids))
