"""Turn an answer's tokens into text as they come: in whole characters, and up to a stop string."""

import unicodedata
from collections.abc import Sequence

from ..errors import InputError, describe
from ..tokenizer import Tokenizer, check_text, make_detokenizer

ZERO_WIDTH_JOINER = "\u200d"  # joins emoji into one, such as people into a family
MAX_CHARACTER_LENGTH = 64  # in code points; longer characters are not held back


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or more stop strings as a tuple. Raise InputError for a stop string that is empty or not a text."""
    stops = (stop,) if isinstance(stop, str) else stop
    if isinstance(stops, bytes) or not isinstance(stops, Sequence):
        raise InputError(f"stop is {describe(stop)}; it must be a string, or a list of strings")
    for i, text in enumerate(stops):
        check_text(text, f"stop string {i}")
        if not text:
            raise InputError(f"stop string {i} is empty: every answer would end before it begins; leave it out")
    return tuple(stops)


class IncrementalText:
    """The text of one answer, released as its tokens come.

    Text is released once it ends with a whole character and cannot be the beginning of a stop string. The answer ends before
    the first stop string that is complete, or before the longest if several are complete at once; `stopped` is then True.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.detokenizer = make_detokenizer(tokenizer)
        self.stops = stops
        self.stopped = False
        self.pending = ""  # decoded text that is held back

    def begin(self, tokens: list[int]) -> str:
        """Return the text of the prompt before the answer; stop strings in it have no effect."""
        return self.detokenizer.begin(tokens)

    def push(self, token: int) -> str:
        """Return the text that is released by a token; "" if all is held back."""
        return self._release(self.detokenizer.push(token), final=False)

    def end(self) -> str:
        """Return the text that was held back."""
        return self._release(self.detokenizer.end(), final=True)

    def _release(self, text: str, final: bool) -> str:
        """Add text to the pending text, and return what can be released; with `final`, return all text before a stop string."""
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
    """Return where the longest suffix of a text starts that is a proper prefix of a stop string; len(text) if there is none."""
    return min(
        (len(text) - n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
        default=len(text),
    )


def last_character_start(text: str) -> int:
    """Return where the last character of a text starts, since the next code point may still belong to this character.

    Return len(text) if no code point can belong to the last character: after a control character, or if the character has
    more than MAX_CHARACTER_LENGTH code points.
    """
    if not text or unicodedata.category(text[-1]) == "Cc":
        return len(text)
    start = len(text) - 1
    while start and len(text) - start <= MAX_CHARACTER_LENGTH and extends_character(text[start], text[:start]):
        start -= 1
    return start if len(text) - start <= MAX_CHARACTER_LENGTH else len(text)


def extends_character(char: str, before: str) -> bool:
    """Return True if a code point is part of the character that ends `before`: roughly, of its extended grapheme cluster."""
    if "\U0001f1e6" <= char <= "\U0001f1ff":  # regional indicators: two make a flag
        return (len(before) - len(before.rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))) % 2 == 1
    return (
        unicodedata.category(char) in ("Mn", "Mc", "Me")  # combining marks and variation selectors
        or char in (ZERO_WIDTH_JOINER, "\u200c")
        or "\U0001f3fb" <= char <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= char <= "\U000e007f"  # tag characters, in flags of regions
        or "\u1160" <= char <= "\u11ff"  # vowels and final consonants of Hangul syllables
        or before[-1:] == ZERO_WIDTH_JOINER
        or (before[-1:] != "" and unicodedata.combining(before[-1]) == 9)  # a virama joins two consonants
    )
