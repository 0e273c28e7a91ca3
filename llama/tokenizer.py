"""Encode text as tokens, and decode tokens, with SentencePiece."""

import codecs
import os
from collections.abc import Callable, Iterable
from operator import index
from typing import Protocol

from sentencepiece import SentencePieceProcessor

from .errors import (
    CheckpointError,
    InputError,
    check_flag,
    check_path,
    describe,
    explain_system_error,
    identify_format,
    read_file,
)

MAX_FILE_BYTES = 1 << 24  # limit for a tokenizer's file; tokenizers of other models have a few million bytes


class Tokenizer:
    """A SentencePiece model. Llama 2's model has 32,000 tokens, BOS 1, EOS 2 and no padding token (`pad_id` is -1).

    more_eos_ids: tokens that end answers besides EOS. begins_with_bos: True if the model's texts begin with BOS.
    """

    more_eos_ids: tuple[int, ...] = ()
    begins_with_bos = True

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
        except MemoryError as e:
            raise CheckpointError(f"{path}: {explain_system_error(e)}") from e
        except Exception as e:  # the type of the exception depends on the version of sentencepiece
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
                f"{path}: damaged: the text of the unknown piece has {len(unknown):,} characters; fetch tokenizer.model again"
            )

        # Code Llama's tokens for infilling; -1 in a tokenizer without them
        pieces = ("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>")
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = (
            -1 if (id_ := self.sp_model.piece_to_id(piece)) == self.sp_model.unk_id() else id_ for piece in pieces
        )

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Return the tokens of `s`, after BOS if `bos` is True, and before EOS if `eos` is True.

        Control pieces such as "<s>" in `s` are encoded like any other text. Raises InputError unless `s` is a string that UTF-8
        can encode.
        """
        check_text(s, "the text to encode")
        check_flag(bos, "bos")
        check_flag(eos, "eos")
        return [self.bos_id] * bool(bos) + self.sp_model.encode(s) + [self.eos_id] * bool(eos)

    def decode(self, ids: Iterable[int] | int) -> str:
        """Return the text of one or more tokens; BOS and EOS have no text. Raises InputError for values that are not tokens."""
        return self.sp_model.decode(self._check_ids(ids))

    def _check_ids(self, ids: Iterable[int] | int) -> list[int]:
        """Return tokens as a list. Raise InputError for values that are not tokens."""
        try:
            checked = [index(i) for i in ids] if isinstance(ids, Iterable) else [index(ids)]
        except TypeError as e:
            raise InputError(f"the tokens to decode are {describe(ids)}; they must be a list of whole numbers") from e
        for i in checked:
            if not 0 <= i < self.n_words:
                raise InputError(f"token {describe(i)} is out of range: this tokenizer has the tokens 0 to {self.n_words - 1}")
        return checked

    def encode_infilling(self, s: str) -> list[int]:
        """Return the tokens of a text that continues another text. Unlike `encode`, this adds no space before the text."""
        check_text(s, "the text to encode")
        before = self.sp_model.encode(_ANCHOR)
        return self.sp_model.encode(_ANCHOR + s)[len(before) :]

    def decode_infilling(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens that continue another text. A space at its beginning is kept; `decode` would remove it."""
        return self.decode([*self.sp_model.encode(_ANCHOR), *tokens]).removeprefix(_ANCHOR)

    def is_control(self, token: int) -> bool:
        """Return True for a token that has no text, such as EOS."""
        return self.sp_model.is_control(token)

    def token_bytes(self, token: int, first: bool = False) -> bytes:
        """Return the text of a token by itself, in UTF-8: with its space, unless it is the first of a text.

        A token of a single byte may be a part of a character.
        """
        if self.sp_model.is_byte(token):
            # The piece of a byte contains its value in hexadecimal, for example <0xF0> for byte 240.
            return bytes.fromhex(self.sp_model.id_to_piece(token)[3:-1])
        if self.sp_model.is_control(token):
            return b""
        is_unknown = self.sp_model.is_unknown(token)
        text = self.sp_model.decode([token]) if is_unknown else self.sp_model.id_to_piece(token).replace("\u2581", " ")
        return (text.removeprefix(" ") if first else text).encode()

    def make_detokenizer(self) -> "RowDetokenizer":
        """Return a detokenizer for one row; a `CustomDetokenizer` if a caller has replaced `decode`."""
        is_original = getattr(self.decode, "__func__", None) is _DECODE
        return Detokenizer(self) if is_original else CustomDetokenizer(self.decode)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that a model is to continue, after BOS if the model's texts begin with it."""
    begins_with_bos = getattr(tokenizer, "begins_with_bos", True)  # a caller's own tokenizer need not have it
    return tokenizer.encode(text, bos=begins_with_bos or not text, eos=False)


_ANCHOR = "\u263a"  # a character that SentencePiece never merges with another character


class Detokenizer:
    """Decode one row's tokens one by one, in constant time per token.

    The texts that it returns, joined, are `Tokenizer.decode` of all tokens. SentencePiece removes the space at the beginning of
    a text. It decodes adjacent tokens of single bytes as UTF-8, with one replacement character for each invalid byte. So bytes
    are held back until they form a character, or can no longer form one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.sp_model, self.token_bytes = tokenizer.sp_model, tokenizer.token_bytes
        # SentencePiece removes the leading space of a token that is decoded alone, so each token is decoded after a context.
        # Until some token has produced text, the context is all tokens so far. After that, it is the unknown token alone.
        self.context: list[int] = []
        self.context_text = ""
        self.pending_bytes = b""

    def begin(self, tokens: list[int]) -> str:
        """Start with the tokens before the answer, and return their text.

        If they end in the middle of a character, its bytes wait for the rest.
        """
        n = len(tokens)
        while n and self.sp_model.is_byte(tokens[n - 1]):
            n -= 1
        text = self.sp_model.decode(tokens[:n])
        self.context = list(tokens[:n])
        if text:
            self._use_short_context()
        return text + "".join(map(self.push, tokens[n:]))

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now complete."""
        if self.sp_model.is_byte(token):
            self.pending_bytes += self.token_bytes(token)
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
        """End the row, and return the text of the bytes that are still held back."""
        return self._decode_bytes(final=True)

    def _use_short_context(self) -> None:
        """From now on, decode each token with the unknown token (<unk>) as its context, not with all tokens so far.

        SentencePiece keeps the space of a token only after a token that has a text, such as the unknown token.
        """
        self.context = [self.sp_model.unk_id()]
        self.context_text = self.sp_model.decode(self.context)

    def _decode_bytes(self, final: bool) -> str:
        """Return the text of the complete characters among the bytes held back. final: decode incomplete characters as well."""
        text, self.pending_bytes = decode_characters(self.pending_bytes, final)
        if text:
            self._use_short_context()
        return text


def decode_characters(data: bytes, final: bool) -> tuple[str, bytes]:
    """Return the text of the complete characters at the beginning of `data`, and the bytes that remain.

    As in SentencePiece, each invalid byte becomes one replacement character. final: nothing remains.
    """
    text, n = "", 1
    while data and n:
        try:
            chars, n = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as e:
            chars, n = data[: e.start].decode() + "\ufffd", e.start + 1
        text, data = text + chars, data[n:]
    return text, data


_DECODE = Tokenizer.decode


class CustomDetokenizer:
    """Return the text of one row as its tokens arrive, with a caller's replacement for `decode`.

    For each new token, all tokens of the row are decoded again, because decoding only some of them could give another text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.tokens, self.sent = decode, list[int](), ""

    def begin(self, tokens: list[int]) -> str:
        """Start with the tokens before the answer, and return their text, without an incomplete character at its end."""
        self.tokens, self.sent = list(tokens), self.decode(tokens).rstrip("\ufffd")
        return self.sent

    def push(self, token: int) -> str:
        """Add a token, and return the new text.

        Returns "" while a character is incomplete, or if the token changes text that was returned before.
        """
        self.tokens.append(token)
        text = self.decode(self.tokens)
        return "" if text.endswith("\ufffd") else self._send(text)

    def end(self) -> str:
        """End the row, and return the text that has not been returned yet."""
        return self._send(self.decode(self.tokens))

    def _send(self, text: str) -> str:
        """Return the part of `text` that has not been returned yet.

        Returns "" if `text` does not begin with the text returned so far.
        """
        if not text.startswith(self.sent):
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


class RowDetokenizer(Protocol):
    """What decodes the tokens of one row one by one."""

    def begin(self, tokens: list[int]) -> str: ...
    def push(self, token: int) -> str: ...
    def end(self) -> str: ...


def make_detokenizer(tokenizer: Tokenizer) -> RowDetokenizer:
    """Return a detokenizer for one row: the tokenizer's own, or a `CustomDetokenizer` for a caller's tokenizer."""
    make = getattr(type(tokenizer), "make_detokenizer", None)  # not that of a tokenizer that a caller's own wraps
    return make(tokenizer) if make else CustomDetokenizer(tokenizer.decode)


def check_text(text: str, name: str) -> None:
    """Raise InputError unless a text is a string that UTF-8 can encode. name: what the error calls the text."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {describe(text)}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        surrogate = f"a lone surrogate ({text[e.start]!r} at {e.start})"
        raise InputError(f"{name} holds {surrogate}, which is no character; read the text as UTF-8, or remove it") from e
