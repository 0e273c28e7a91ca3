"""The text of an answer as its ids come: characters that are whole, and the strings at which it stops."""

import unicodedata
from collections.abc import Sequence

from ..errors import InputError, describe
from ..tokenizer import Tokenizer, check_text, make_detokenizer

ZERO_WIDTH_JOINER = "\u200d"  # makes one character of two: a family of its people
MAX_CHARACTER_LENGTH = 64  # code points of one character, for which a stream waits


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings, one or many, as a tuple; InputError if any cannot be one."""
    stops = (stop,) if isinstance(stop, str) else stop
    if isinstance(stops, bytes) or not isinstance(stops, Sequence):
        raise InputError(f"stop is {describe(stop)}; it must be a string, or a list of strings")
    for i, text in enumerate(stops):
        check_text(text, f"stop string {i}")
        if not text:
            raise InputError(f"stop string {i} is empty: every answer would end before it begins; leave it out")
    return tuple(stops)


class IncrementalText:
    """One answer's text. What is released stays: it ends with a whole character, and is no part of a stop string.

    The answer ends before the stop string that is complete first, of several the longest; `stopped` then says so.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.ids = make_detokenizer(tokenizer)
        self.stops = stops
        self.stopped = False
        self.pending = ""

    def begin(self, ids: list[int]) -> str:
        """The text of a prompt that stands before the answer; no stop is sought in it."""
        return self.ids.begin(ids)

    def push(self, id_: int) -> str:
        """What the id releases: "" where all is held back."""
        return self._release(self.ids.push(id_), final=False)

    def end(self) -> str:
        """What was held back."""
        return self._release(self.ids.end(), final=True)

    def _release(self, text: str, final: bool) -> str:
        self.pending += text
        ends = [(start + len(stop), start) for stop in self.stops if (start := self.pending.find(stop)) >= 0]
        if ends:
            self.stopped, cut = True, min(ends)[1]
        else:
            cut = (
                len(self.pending)
                if final
                else min(last_character_start(self.pending), stop_prefix_start(self.pending, self.stops))
            )
        released, self.pending = self.pending[:cut], self.pending[cut:]
        return released


def stop_prefix_start(text: str, stops: Sequence[str]) -> int:
    """Where the longest suffix of the text begins that is a proper prefix of a stop string; len(text) if there is none."""
    return min(
        (len(text) - n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
        default=len(text),
    )


def last_character_start(text: str) -> int:
    """Where the last character begins, to which the next code point may still belong; all is whole after a control."""
    if not text or unicodedata.category(text[-1]) == "Cc":
        return len(text)
    start = len(text) - 1
    while start and len(text) - start <= MAX_CHARACTER_LENGTH and extends_character(text[start], text[:start]):
        start -= 1
    return start if len(text) - start <= MAX_CHARACTER_LENGTH else len(text)


def extends_character(char: str, before: str) -> bool:
    """Whether a code point is part of the character that ends `before`: about Unicode's extended grapheme clusters."""
    if "\U0001f1e6" <= char <= "\U0001f1ff":  # letters of flags, which come in pairs
        return (len(before) - len(before.rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))) % 2 == 1
    return (
        unicodedata.category(char) in ("Mn", "Mc", "Me")  # marks, and what selects a variation
        or char in (ZERO_WIDTH_JOINER, "\u200c")
        or "\U0001f3fb" <= char <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= char <= "\U000e007f"  # tags, of regions' flags
        or "\u1160" <= char <= "\u11ff"  # vowels and finals of Hangul syllables
        or before[-1:] == ZERO_WIDTH_JOINER
        or (before[-1:] != "" and unicodedata.combining(before[-1]) == 9)  # a virama joins two consonants
    )
