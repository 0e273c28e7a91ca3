"""Encode text as tokens, and decode tokens, with SentencePiece."""

import codecs
import os
from collections.abc import Callable, Iterable
from operator import index

from sentencepiece import SentencePieceProcessor

from .errors import CheckpointError, InputError, check_flag, check_path, describe, identify_format, read_file

MAX_FILE_BYTES = 1 << 24  # limit for a tokenizer's file; tokenizers of other models have some million bytes


class Tokenizer:
    """A SentencePiece model. Llama 2's has 32,000 pieces, BOS 1, EOS 2 and no padding piece (`pad_id` -1)."""

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        path = check_path(model_path, "tokenizer_path", "Meta's tokenizer.model, which is stored beside the model folders")
        data = read_file(path, MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path}: larger than {MAX_FILE_BYTES:,} bytes; Llama 2's tokenizer.model has 499,723, so it is another file"
            )
        try:
            self.sp_model = SentencePieceProcessor()
            self.sp_model.LoadFromSerializedProto(data)
            self.n_words: int = self.sp_model.vocab_size()
        except Exception as e:  # which exception depends on the version of sentencepiece
            file_format = identify_format(data[:64])
            raise CheckpointError(f"{path}: not a SentencePiece model ({file_format}); fetch tokenizer.model again") from e
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        if not all(0 <= id_ < self.n_words for id_ in (self.bos_id, self.eos_id, self.sp_model.unk_id())):
            raise CheckpointError(
                f"{path}: a SentencePiece model without BOS and EOS, or without an unknown piece, is not Llama's; "
                "fetch tokenizer.model again"
            )
        try:  # decode every piece, so that `decode` cannot fail later
            self.sp_model.id_to_piece(list(range(self.n_words)))
            unknown = self.sp_model.decode([self.sp_model.unk_id()])
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{path}: damaged: the text of a piece is not UTF-8; fetch tokenizer.model again") from e
        if len(unknown) > 100:
            raise CheckpointError(
                f"{path}: damaged: the text of the unknown piece has {len(unknown):,} letters; fetch tokenizer.model again"
            )

        # Code Llama's tokens for infilling; -1 in a tokenizer without them
        pieces = ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>")
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = (
            -1 if (id_ := self.sp_model.piece_to_id(piece)) == self.sp_model.unk_id() else id_ for piece in pieces
        )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Return the tokens of `s`, with BOS before and EOS after them if asked for. Control pieces such as "<s>" in `s` are
        encoded like any other text. Raises InputError unless `s` is a string that UTF-8 can encode."""
        check_text(s, "the text to encode")
        check_flag(bos, "bos")
        check_flag(eos, "eos")
        return [self.bos_id] * bool(bos) + self.sp_model.encode(s) + [self.eos_id] * bool(eos)

    def decode(self, ids: Iterable[int] | int) -> str:
        """Return the text of one or more tokens; BOS and EOS have no text. Raises InputError for values that are not tokens."""
        try:
            ids = [index(i) for i in ids] if isinstance(ids, Iterable) else [index(ids)]
        except TypeError as e:
            raise InputError(f"the tokens to decode are {describe(ids)}; they must be a list of whole numbers") from e
        for i in ids:
            if not 0 <= i < self.n_words:
                raise InputError(f"token {describe(i)} is out of range: this tokenizer has the tokens 0 to {self.n_words - 1}")
        return self.sp_model.decode(ids)

    def encode_infilling(self, s: str) -> list[int]:
        """Return the tokens of a text that continues another: without the space that SentencePiece adds before a text."""
        check_text(s, "the text to encode")
        before = self.sp_model.encode(_ANCHOR)
        return self.sp_model.encode(_ANCHOR + s)[len(before) :]

    def decode_infilling(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens that continue a text: a space at the beginning is kept, which `decode` would remove."""
        return self.decode([*self.sp_model.encode(_ANCHOR), *tokens]).removeprefix(_ANCHOR)


_ANCHOR = "\u263a"  # a character that SentencePiece merges with no other


class Detokenizer:
    """Decode one row's tokens one by one. The parts joined are `Tokenizer.decode` of all tokens; each token takes equal time.

    SentencePiece removes the space at the beginning of the first piece, and decodes adjacent byte pieces as UTF-8, with one
    replacement character for each invalid byte. So bytes are held back until their character is complete, or must be invalid.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.sp_model = tokenizer.sp_model
        # Tokens to decode before the next token, because the beginning of a text loses its space: all tokens so far while they
        # have no text, then the unknown piece alone.
        self.context: list[int] = []
        self.context_text = ""
        self.pending_bytes = b""

    def begin(self, tokens: list[int]) -> str:
        """Return the text of the tokens before the answer. Their last character must be complete."""
        text = self.sp_model.decode(tokens)
        self.context = list(tokens)
        if text:
            self._use_short_context()
        return text

    def push(self, token: int) -> str:
        """Return the text that is complete with this token."""
        if self.sp_model.is_byte(token):
            self.pending_bytes += bytes.fromhex(self.sp_model.id_to_piece(token)[3:-1])  # the piece of byte 240 is <0xF0>
            return self._decode_bytes(final=False)
        text_of_bytes = self._decode_bytes(final=True)
        if self.sp_model.is_control(token):
            return text_of_bytes
        text = self.sp_model.decode([*self.context, token])[len(self.context_text) :]
        if text:
            self._use_short_context()
        elif not self.context_text:
            self.context.append(token)
        return text_of_bytes + text

    def end(self) -> str:
        """Return the text of the bytes held back."""
        return self._decode_bytes(final=True)

    def _use_short_context(self) -> None:
        """Decode later tokens after the unknown piece, which has a text, so that they keep their spaces."""
        self.context = [self.sp_model.unk_id()]
        self.context_text = self.sp_model.decode(self.context)

    def _decode_bytes(self, final: bool) -> str:
        """Return the text of the complete characters among the bytes held back; with `final`, of all these bytes."""
        text, n = "", 1
        while self.pending_bytes and n:
            try:
                chars, n = codecs.utf_8_decode(self.pending_bytes, "strict", final)
            except UnicodeDecodeError as e:
                chars, n = self.pending_bytes[: e.start].decode() + "\ufffd", e.start + 1
            text, self.pending_bytes = text + chars, self.pending_bytes[n:]
        if text:
            self._use_short_context()
        return text


_DECODE = Tokenizer.decode


class CustomDetokenizer:
    """Decode one row's tokens one by one with a caller's own `decode`: all tokens are decoded anew at each token."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.tokens, self.sent = decode, list[int](), ""

    def begin(self, tokens: list[int]) -> str:
        """Return the text of the tokens before the answer."""
        self.tokens, self.sent = list(tokens), self.decode(tokens)
        return self.sent

    def push(self, token: int) -> str:
        """Return the new text; "" while a character is incomplete, or if the new token has changed the text before it."""
        self.tokens.append(token)
        text = self.decode(self.tokens)
        return "" if text.endswith("\ufffd") else self._send(text)

    def end(self) -> str:
        """Return the text that was not returned before."""
        return self._send(self.decode(self.tokens))

    def _send(self, text: str) -> str:
        """Return the part of the whole text that was not returned before; "" if the text has changed before that part."""
        if not text.startswith(self.sent):
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


def make_detokenizer(tokenizer: Tokenizer) -> Detokenizer | CustomDetokenizer:
    """Return a detokenizer for one row; a `CustomDetokenizer` if a caller has replaced the tokenizer's `decode`."""
    is_original = getattr(tokenizer.decode, "__func__", None) is _DECODE
    return Detokenizer(tokenizer) if is_original else CustomDetokenizer(tokenizer.decode)


def check_text(text: str, name: str) -> None:
    """Raise InputError, which calls the text `name`, unless it is a string that UTF-8 can encode."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {describe(text)}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        surrogate = f"a lone surrogate ({text[e.start]!r} at {e.start})"
        raise InputError(f"{name} holds {surrogate}, which is no character; read the text as UTF-8, or remove it") from e
