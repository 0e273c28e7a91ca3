"""Decode the tokens of an answer to text while they are generated: in whole characters, and up to a stop string."""

import unicodedata
from collections.abc import Sequence

from ..errors import InputError, describe
from ..tokenizer import Tokenizer, check_text, make_detokenizer

ZERO_WIDTH_JOINER = "\u200d"  # joins several emoji into one, as in the emoji of a family
MAX_CHARACTER_LENGTH = 64  # in code points; if the possibly incomplete end of a text is longer, it is returned anyway


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return a tuple of the given stop string or strings. Raise InputError if one is empty or not valid text."""
    stops = (stop,) if isinstance(stop, str) else stop
    if isinstance(stops, bytes) or not isinstance(stops, Sequence):
        raise InputError(f"stop is {describe(stop)}; it must be a string, or a list of strings")
    for i, text in enumerate(stops):
        check_text(text, f"stop string {i}")
        if not text:
            raise InputError(f"stop string {i} is empty: every answer would end before it begins; leave it out")
    return tuple(stops)


class IncrementalText:
    """Decode the tokens of one answer, and release text as early as possible.

    Text is held back while its last character may be incomplete, and while it may be the beginning of a stop string. The answer
    ends before the first complete stop string, and `stopped` becomes True. If several stop strings end at the same place, the
    answer ends before the longest of them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.detokenizer = make_detokenizer(tokenizer)
        self.stops = stops
        self.stopped = False
        self.pending = ""  # decoded text that has not been released yet

    def begin(self, tokens: list[int]) -> str:
        """Begin after a prompt, given as tokens. Return the text of the prompt, in which stop strings have no effect."""
        return self.detokenizer.begin(tokens)

    def push(self, token: int) -> str:
        """Add a token. Return the text that can be released now, or "" if all text is held back."""
        return self._release(self.detokenizer.push(token), final=False)

    def end(self) -> str:
        """End the answer. Return the text that has been held back, up to a stop string."""
        return self._release(self.detokenizer.end(), final=True)

    def _release(self, text: str, final: bool) -> str:
        """Add text to the pending text, and return the part to release; with `final`, this is all text up to a stop string."""
        self.pending += text
        ends = [(start + len(stop), start) for stop in self.stops if (start := self.pending.find(stop)) >= 0]
        if ends:
            self.stopped, cut = True, min(ends)[1]
        elif final:
            cut = len(self.pending)
        else:
            cut = min(last_character_start(self.pending), stop_prefix_start(self.pending, self.stops))
        released, self.pending = self.pending[:cut], self.pending[cut:]
        return released


def stop_prefix_start(text: str, stops: Sequence[str]) -> int:
    """Return the index where a stop string may have begun that is still incomplete at the end of the text.

    Return len(text) if there is none.
    """
    return min(
        (len(text) - n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
        default=len(text),
    )


def last_character_start(text: str) -> int:
    """Return the index where the last character of a text starts. The next code point may still belong to this character.

    Return len(text) if the last character is complete: if it is a control character, or has more than MAX_CHARACTER_LENGTH
    code points.
    """
    if not text or unicodedata.category(text[-1]) == "Cc":
        return len(text)
    start = len(text) - 1
    while start and len(text) - start <= MAX_CHARACTER_LENGTH and extends_character(text[start], text[:start]):
        start -= 1
    return start if len(text) - start <= MAX_CHARACTER_LENGTH else len(text)


def extends_character(char: str, before: str) -> bool:
    """Return True if the code point `char` belongs to the character at the end of the text `before`.

    This approximates the extended grapheme clusters of Unicode.
    """
    if "\U0001f1e6" <= char <= "\U0001f1ff":  # regional indicators, each pair of which is one flag
        return (len(before) - len(before.rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))) % 2 == 1
    return (
        unicodedata.category(char) in ("Mn", "Mc", "Me")  # combining marks, and variation selectors of emoji
        or char in (ZERO_WIDTH_JOINER, "\u200c")
        or "\U0001f3fb" <= char <= "\U0001f3ff"  # skin tones of emoji
        or "\U000e0020" <= char <= "\U000e007f"  # tag characters, used in flags of regions
        or "\u1160" <= char <= "\u11ff"  # vowels and final consonants of Hangul syllables
        or before[-1:] == ZERO_WIDTH_JOINER
        or (before[-1:] != "" and unicodedata.combining(before[-1]) == 9)  # a virama, which joins two consonants
    )
