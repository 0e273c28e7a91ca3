"""Text to ids and back, by SentencePiece."""

import codecs
import os
from collections.abc import Callable, Iterable
from operator import index

from sentencepiece import SentencePieceProcessor

from .errors import CheckpointError, InputError, check_flag, check_path, describe, identify_format, read_file

MAX_BYTES = 1 << 24  # bytes: other models' have some millions


class Tokenizer:
    """A SentencePiece model. Llama 2's has 32,000 pieces, BOS 1, EOS 2 and no padding piece (`pad_id` -1)."""

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = check_path(model_path, "tokenizer_path", "Meta's tokenizer.model, which lies beside the model folders")
        data = read_file(path, MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_BYTES:,} bytes, where Llama 2's has 499,723: it is another file")
        try:
            self.sp_model = SentencePieceProcessor()
            self.sp_model.LoadFromSerializedProto(data)
            self.n_words: int = self.sp_model.vocab_size()
        except Exception as e:  # sentencepiece raises RuntimeError and others by version
            found = identify_format(data[:64])
            raise CheckpointError(f"{path}: not a SentencePiece model ({found}); fetch tokenizer.model again") from e
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if not all(0 <= id_ < self.n_words for id_ in (self.bos_id, self.eos_id, self.sp_model.unk_id())):
            raise CheckpointError(
                f"{path}: a SentencePiece model without BOS and EOS pieces, or an unknown one, is not Llama's"
            )
        try:  # what `decode` may meet
            self.sp_model.id_to_piece(list(range(self.n_words)))
            unknown = self.sp_model.decode([self.sp_model.unk_id()])
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{path}: damaged, as a piece's text is not UTF-8; fetch tokenizer.model again") from e
        if len(unknown) > 100:
            raise CheckpointError(f"{path}: damaged, as an unknown id is {len(unknown):,} letters; fetch tokenizer.model again")

        # Code Llama's, of which some tokenizers have none: -1
        pieces = ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>")
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = (
            -1 if (id_ := self.sp_model.piece_to_id(piece)) == self.sp_model.unk_id() else id_ for piece in pieces
        )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of `s`, after BOS and before EOS where asked for. Control pieces in the text are plain text. Raises
        InputError for what is no text that UTF-8 can hold."""
        check_text(s, "the text to encode")
        check_flag(bos, "bos")
        check_flag(eos, "eos")
        return [self.bos_id] * bool(bos) + self.sp_model.encode(s) + [self.eos_id] * bool(eos)

    def decode(self, ids: Iterable[int] | int) -> str:
        """The text of the ids, or of one; BOS and EOS have none. Raises InputError for what is no id."""
        try:
            ids = [index(i) for i in ids] if isinstance(ids, Iterable) else [index(ids)]
        except TypeError as e:
            raise InputError(f"the ids to decode are {describe(ids)}; they must be a list of whole numbers") from e
        for i in ids:
            if not 0 <= i < self.n_words:
                raise InputError(f"token id {describe(i)} is out of range: this tokenizer has the ids 0 to {self.n_words - 1}")
        return self.sp_model.decode(ids)

    def encode_infilling(self, s: str) -> list[int]:
        """Return the tokens of `s` in the middle of a text: without the space that SentencePiece puts before a text."""
        check_text(s, "the text to encode")
        before = self.sp_model.encode(_ANCHOR)
        return self.sp_model.encode(_ANCHOR + s)[len(before) :]

    def decode_infilling(self, ids: Iterable[int]) -> str:
        """Return the text of tokens in the middle of a text, with the space that they may begin with."""
        return self.decode([*self.sp_model.encode(_ANCHOR), *ids]).removeprefix(_ANCHOR)


_ANCHOR = "\u263a"  # is joined with no letter beside it


class Detokenizer:
    """The text of one row's ids as they come; joined it is `Tokenizer.decode` of them all, at the same work for each id.

    SentencePiece drops the space that the first piece begins with, and reads a run of byte pieces as UTF-8, with one
    replacement character for each byte of none. So bytes wait until their character is whole, or cannot be any more.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.sp_model = tokenizer.sp_model
        self.before: list[int] = []  # ids so far, while they have no text; then the unknown piece, which has some
        self.prefix = ""  # the text of these
        self.bytes = b""

    def begin(self, ids: list[int]) -> str:
        """The text of ids that stand before, whose last character is whole, all at once."""
        text = self.sp_model.decode(ids)
        self.before = list(ids)
        if text:
            self._begun()
        return text

    def push(self, id_: int) -> str:
        """What is certain now."""
        if self.sp_model.is_byte(id_):
            self.bytes += bytes.fromhex(self.sp_model.id_to_piece(id_)[3:-1])  # <0xF0>
            return self._characters(final=False)
        run = self._characters(final=True)
        if self.sp_model.is_control(id_):
            return run
        text = self.sp_model.decode([*self.before, id_])[len(self.prefix) :]
        if text:
            self._begun()
        elif not self.prefix:
            self.before.append(id_)
        return run + text

    def end(self) -> str:
        """What waited."""
        return self._characters(final=True)

    def _begun(self) -> None:
        self.before = [self.sp_model.unk_id()]
        self.prefix = self.sp_model.decode(self.before)

    def _characters(self, final: bool) -> str:
        text, n = "", 1
        while self.bytes and n:
            try:
                chars, n = codecs.utf_8_decode(self.bytes, "strict", final)
            except UnicodeDecodeError as e:
                chars, n = self.bytes[: e.start].decode() + "\ufffd", e.start + 1
            text, self.bytes = text + chars, self.bytes[n:]
        if text:
            self._begun()
        return text


_DECODE = Tokenizer.decode


class CustomDetokenizer:
    """What `Detokenizer` does, by a caller's own `decode`: of all tokens at each one, as it may make anything of them."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.ids, self.sent = decode, list[int](), ""

    def begin(self, ids: list[int]) -> str:
        self.ids, self.sent = list(ids), self.decode(ids)
        return self.sent

    def push(self, id_: int) -> str:
        """Return the text that is new; none while a character is incomplete, or if the text so far has changed."""
        self.ids.append(id_)
        text = self.decode(self.ids)
        return "" if text.endswith("\ufffd") else self._send(text)

    def end(self) -> str:
        return self._send(self.decode(self.ids))

    def _send(self, text: str) -> str:
        if not text.startswith(self.sent):
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


def make_detokenizer(tokenizer: Tokenizer) -> Detokenizer | CustomDetokenizer:
    """Return what makes a row's text, by the tokenizer's own `decode` if a caller has put one there."""
    ours = getattr(tokenizer.decode, "__func__", None) is _DECODE
    return Detokenizer(tokenizer) if ours else CustomDetokenizer(tokenizer.decode)


def check_text(text: str, name: str) -> None:
    """Raise InputError, with `name`, unless the text is one that can be encoded."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {describe(text)}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        found = f"a lone surrogate ({text[e.start]!r} at {e.start})"
        raise InputError(f"{name} holds {found}, which is no character; read it as UTF-8, or take it out") from e
