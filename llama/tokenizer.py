"""Text to ids and back, by SentencePiece."""

import os
from collections.abc import Iterable
from operator import index

from sentencepiece import SentencePieceProcessor

from .errors import CheckpointError, InputError, kind, path_to, read_file, what_is_it


class Tokenizer:
    """A SentencePiece model. Llama 2's has 32,000 pieces, BOS 1, EOS 2 and no padding piece (`pad_id` -1)."""

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = path_to(model_path, "tokenizer_path", "Meta's tokenizer.model, which lies beside the model folders")
        data = read_file(path)
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
        check_text(s, "the text to encode")
        return [self.bos_id] * bool(bos) + self.sp_model.encode(s) + [self.eos_id] * bool(eos)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; BOS and EOS have none."""
        try:
            ids = [index(i) for i in ids]
        except TypeError as e:
            raise InputError(f"the ids to decode are {kind(ids)}; they must be a list of whole numbers") from e
        for i in ids:
            if not 0 <= i < self.n_words:
                raise InputError(f"token id {kind(i)} is out of range: this tokenizer has the ids 0 to {self.n_words - 1}")
        return self.sp_model.decode(ids)


def check_text(text: str, name: str) -> None:
    """Raise InputError, with `name`, unless the text is one that can be encoded."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {kind(text)}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        found = f"a lone surrogate ({text[e.start]!r} at {e.start})"
        raise InputError(f"{name} holds {found}, which is no character; read it as UTF-8, or take it out") from e
