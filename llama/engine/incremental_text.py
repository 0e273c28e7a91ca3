"""Decode the tokens of an answer to text while they are generated, up to a stop string."""

from collections.abc import Sequence

from ..errors import InputError, describe
from ..tokenizer import Tokenizer, check_text, make_detokenizer
from .requests import GenerationCall, Request


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return a tuple of the given stop string or strings, if any. Raise InputError if one is empty or not valid text."""
    stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if isinstance(stops, bytes) or not isinstance(stops, Sequence):
        raise InputError(f"stop is {describe(stop)}; it must be a string, or a list of strings")
    for i, text in enumerate(stops):
        check_text(text, f"stop string {i}")
        if not text:
            raise InputError(f"stop string {i} is empty: every answer would end before it begins; leave it out")
    return tuple(stops)


class IncrementalText:
    """Decode the tokens of one answer, and release the text of each token at once.

    Only incomplete UTF-8, and text that may be the beginning of a stop string, are held back. The answer ends before the first
    complete stop string, and `stopped` becomes True. If several stop strings end at the same place, the answer ends before the
    longest of them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.detokenizer = make_detokenizer(tokenizer)
        self.stops = stops
        self.stopped = False
        self.prompt_text = ""  # the text of the prompt that the answer continues
        self.pending = ""  # decoded text that may be the beginning of a stop string

    @staticmethod
    def of_answer(call: GenerationCall, request: Request, tokenizer: Tokenizer) -> "IncrementalText":
        """Return the text of a request's answer before its first token."""
        text = IncrementalText(tokenizer, request.stop)
        if call.echo or request.continues_prompt:
            text.begin(request.prompt)
        return text

    def begin(self, tokens: list[int]) -> str:
        """Begin after a prompt, given as tokens. Return the text of the prompt, in which stop strings have no effect."""
        self.prompt_text = self.detokenizer.begin(tokens)
        return self.prompt_text

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
            cut = stop_prefix_start(self.pending, self.stops)
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
