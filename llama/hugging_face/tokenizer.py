"""The tokenizer of a folder in Hugging Face's layout: a vocabulary, added tokens, and special tokens that no text contains."""

import codecs
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..checkpoint.hugging_face_settings import AddedToken
from ..errors import InputError, check_flag
from ..tokenizer import CustomDetokenizer, RowDetokenizer, Tokenizer, check_text, decode_characters
from .added_tokens import AddedTokenFinder


class Encoder(Protocol):
    """What encodes a text without added tokens."""

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Return the tokens of a text. at_start: put a space before it, if the vocabulary does so at the start of texts."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer, and how they become text.

    token_bytes: the text of each token in UTF-8; a token may be a part of a character. control: tokens without a text.
    drops_space: decoding removes the space at the start of a text, unless it is by one of the tokens keep_space.
    space_before_each_part: a space is put before each part of a text between added tokens, not only before the first.
    is_byte_level: all tokens are sequences of bytes, as GPT-2's are.
    """

    token_bytes: list[bytes]
    control: frozenset[int]
    drops_space: bool = False
    keep_space: frozenset[int] = frozenset()
    space_before_each_part: bool = False
    is_byte_level: bool = False


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer with added and special tokens. It encodes with tokenizer.json or tokenizer.model.

    Special tokens in a text, such as "</s>", are encoded like any other text. Other added tokens are found in texts.
    """

    def __init__(
        self, encoder: Encoder, vocabulary: Vocabulary, added: Iterable[AddedToken], bos_id: int, eos_id: int, pad_id: int = -1
    ) -> None:
        """added: all added tokens, among them all special tokens of the vocabulary."""
        self.encoder, self.vocabulary, self.added = encoder, vocabulary, {token.text: token for token in added}
        self.bos_id, self.eos_id, self.pad_id, self.n_words = bos_id, eos_id, pad_id, len(vocabulary.token_bytes)
        self.finder = AddedTokenFinder(token for token in self.added.values() if not token.special)
        self.special_finder = AddedTokenFinder(token for token in self.added.values() if token.special)
        infilling = [self.added.get(f"\u2581<{name}>") for name in ("PRE", "MID", "SUF", "EOT")]
        self.prefix_id, self.middle_id, self.suffix_id, self.eot_id = (token.id if token else -1 for token in infilling)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        check_text(s, "the text to encode")
        check_flag(bos, "bos")
        check_flag(eos, "eos")
        return [self.bos_id] * bool(bos) + self.encode_parts([s]) + [self.eos_id] * bool(eos)

    def encode_parts(self, parts: Sequence[str | AddedToken], at_start: bool = True) -> list[int]:
        """Return the tokens of the parts of a text: texts without special tokens, and special tokens themselves.

        at_start: the first part begins the text.
        """
        flat = [each for part in parts for each in (self.finder.split(part) if isinstance(part, str) else [part])]
        tokens: list[int] = []
        for i, part in enumerate(flat):
            if isinstance(part, AddedToken):
                tokens.append(part.id)
                continue
            before, after = flat[i - 1] if i else None, flat[i + 1] if i + 1 < len(flat) else None
            part = part.lstrip() if isinstance(before, AddedToken) and before.rstrip else part
            part = part.rstrip() if isinstance(after, AddedToken) and after.lstrip else part
            tokens += self._encode_text(part, at_start if not i else self.vocabulary.space_before_each_part)
        return tokens

    def _encode_text(self, text: str, at_start: bool) -> list[int]:
        """Return the tokens of a text without added tokens. None of them is special."""
        if not text:
            return []
        tokens = self.encoder.encode(text, at_start)
        if self.vocabulary.control.isdisjoint(tokens):
            return tokens
        # The vocabulary itself finds a special token in the text: divide the text after the first character of each; or, for a
        # token that begins with a space that the text does not have, after each character.
        found: list[int] = []
        for starts in (self.special_finder.starts(text), range(len(text))):
            cuts = sorted({0, *(start + 1 for start in starts), len(text)})
            parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
            tokens = [token for i, part in enumerate(parts) for token in self.encoder.encode(part, at_start and not i)]
            if not (found := sorted(self.vocabulary.control.intersection(tokens))):
                return tokens
        character = next(c for c in text if found[0] in self.encoder.encode(c, False) + self.encoder.encode(c, at_start))
        raise InputError(
            f"the text contains the character U+{ord(character):04X}, which is special token {found[0]}; remove it"
        )

    def decode(self, ids: Iterable[int] | int) -> str:
        detokenizer = ByteDetokenizer(self)
        return detokenizer.begin(self._check_ids(ids)) + detokenizer.end()

    def encode_infilling(self, s: str) -> list[int]:
        check_text(s, "the text to encode")
        return self.encode_parts([s], at_start=False)

    def decode_infilling(self, tokens: Iterable[int]) -> str:
        detokenizer = ByteDetokenizer(self)
        detokenizer.started = True
        return detokenizer.begin(self._check_ids(tokens)) + detokenizer.end()

    def is_control(self, token: int) -> bool:
        return token in self.vocabulary.control

    def token_bytes(self, token: int, first: bool = False) -> bytes:
        vocabulary = self.vocabulary
        if token in vocabulary.control:
            return b""
        text = vocabulary.token_bytes[token]
        drops_space = first and vocabulary.drops_space and token not in vocabulary.keep_space
        return text.removeprefix(b" ") if drops_space else text

    def make_detokenizer(self) -> RowDetokenizer:
        is_original = getattr(self.decode, "__func__", None) is _DECODE
        return ByteDetokenizer(self) if is_original else CustomDetokenizer(self.decode)


_DECODE = HuggingFaceTokenizer.decode


class ByteDetokenizer:
    """Decode one row's tokens one by one. Bytes are held back until they form a character, or can no longer form one."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer, self.pending, self.started = tokenizer, b"", False

    def begin(self, tokens: list[int]) -> str:
        """Start with the tokens before the answer, and return their text."""
        return "".join(map(self.push, tokens))

    def push(self, token: int) -> str:
        """Add a token, and return the text that is now complete. A control token ends a character."""
        if self.tokenizer.is_control(token):
            return self._decode(final=True)
        self.pending += self.tokenizer.token_bytes(token, first=not self.started)
        self.started = True
        return self._decode(final=False)

    def end(self) -> str:
        """End the row, and return the text of the bytes that are still held back."""
        return self._decode(final=True)

    def _decode(self, final: bool) -> str:
        if self.tokenizer.vocabulary.is_byte_level:  # a replacement character for each sequence, as `tokenizers` has it
            text, n = codecs.utf_8_decode(self.pending, "replace", final)
            self.pending = self.pending[n:]
        else:
            text, self.pending = decode_characters(self.pending, final)
        return text
