"""The text of an answer as its ids come: characters that are whole, and the strings at which it stops."""

import contextlib
import unicodedata
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType

from .engine import FinishReason, Request, Token
from .errors import InputError, kind
from .tokenizer import Tokenizer, check_text, detokenizer

JOINER = "\u200d"  # makes one character of two: a family of its people
LONGEST = 64  # code points of one character, for which a stream waits


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings, one or many, as a tuple; InputError if any cannot be one."""
    stops = (stop,) if isinstance(stop, str) else stop
    if isinstance(stops, bytes) or not isinstance(stops, Sequence):
        raise InputError(f"stop is {kind(stop)}; it must be a string, or a list of strings")
    for i, text in enumerate(stops):
        check_text(text, f"stop string {i}")
        if not text:
            raise InputError(f"stop string {i} is empty: every answer would end before it begins; leave it out")
    return tuple(stops)


class Text:
    """One answer's text. What is released stays: it ends with a whole character, and is no part of a stop string.

    The answer ends before the stop string that is complete first, of several the longest; `stopped` then says so.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.ids = detokenizer(tokenizer)
        self.stops = stops
        self.stopped = False
        self.held = ""

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
        self.held += text
        ends = [(start + len(stop), start) for stop in self.stops if (start := self.held.find(stop)) >= 0]
        if ends:
            self.stopped, cut = True, min(ends)[1]
        else:
            cut = len(self.held) if final else min(last_character(self.held), may_stop(self.held, self.stops))
        released, self.held = self.held[:cut], self.held[cut:]
        return released


def may_stop(text: str, stops: Sequence[str]) -> int:
    """Where the longest suffix of the text begins that is a proper prefix of a stop string; len(text) if there is none."""
    return min(
        (len(text) - n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
        default=len(text),
    )


def last_character(text: str) -> int:
    """Where the last character begins, to which the next code point may still belong; all is whole after a control."""
    if not text or unicodedata.category(text[-1]) == "Cc":
        return len(text)
    start = len(text) - 1
    while start and len(text) - start <= LONGEST and attaches(text[start], text[:start]):
        start -= 1
    return start if len(text) - start <= LONGEST else len(text)


def attaches(char: str, before: str) -> bool:
    """Whether a code point is part of the character that ends `before`: about Unicode's extended grapheme clusters."""
    if "\U0001f1e6" <= char <= "\U0001f1ff":  # letters of flags, which come in pairs
        return (len(before) - len(before.rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))) % 2 == 1
    return (
        unicodedata.category(char) in ("Mn", "Mc", "Me")  # marks, and what selects a variation
        or char in (JOINER, "\u200c")
        or "\U0001f3fb" <= char <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= char <= "\U000e007f"  # tags, of regions' flags
        or "\u1160" <= char <= "\u11ff"  # vowels and finals of Hangul syllables
        or before[-1:] == JOINER
        or (before[-1:] != "" and unicodedata.combining(before[-1]) == 9)  # a virama joins two consonants
    )


class Stream:
    """An answer's text, piece by piece as it is made: an iterator of str, joined the same as the whole answer.

    It has the model's cache until it ends: another call in between makes it raise InputError. Leaving early is free;
    `close`, or a `with`, frees at once what it holds. Ranks that share a model must all go on, or all leave at one piece.
    """

    def __init__(self, request: Request, pieces: Generator[str, None, None]) -> None:
        self._request = request
        self._pieces = pieces

    @property
    def finish_reason(self) -> FinishReason | None:
        """ "stop" for EOS or a stop string, "length" for max_gen_len or the window; None until then."""
        return self._request.finish_reason

    @property
    def prompt_tokens(self) -> int:
        return len(self._request.prompt)

    @property
    def new_tokens(self) -> int:
        """Ids made so far, without EOS."""
        return self._request.made

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def pieces(request: Request, tokens: Iterator[Token], text: Text) -> Generator[str, None, None]:
    """Text as it is released. A stop ends the request."""
    with contextlib.closing(tokens):  # type: ignore[type-var]
        for token in tokens:
            piece = text.push(token.id)
            if text.stopped:
                request.finish_reason = "stop"
            if piece:
                yield piece
    if piece := text.end():
        yield piece
