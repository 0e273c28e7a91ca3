"""Added tokens: tokens that a model has beside those of its vocabulary, and that are found in texts by their name."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class AddedToken:
    """A token with a text of its own, such as "<|im_end|>".

    special: a control token, which has no text in answers, and which a text never contains. lstrip, rstrip: the token takes the
    white space before or after it. single_word: it is found only where no letter, digit or underscore touches it.
    """

    id: int
    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class AddedTokenFinder:
    """Find added tokens in a text: the leftmost first, and the longest of those that begin at the same place."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = sorted(tokens, key=lambda token: -len(token.text))
        # One group for each token, so that a match tells which one it is.
        self.pattern = re.compile("|".join(f"({_pattern(token)})" for token in self.tokens)) if self.tokens else None

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """Yield the parts of a text: the added tokens, and the texts before, between and after them, if not empty."""
        end = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self.tokens[match.lastindex - 1]  # type: ignore[operator]  # a match has a group
            end = match.end()
        if end < len(text):
            yield text[end:]

    def starts(self, text: str) -> list[int]:
        """Return the places in a text where the text of a token begins; one token may begin within another."""
        texts = "|".join(re.escape(token.text) for token in self.tokens)
        return [match.start() for match in re.finditer(f"(?={texts})", text)] if self.tokens else []


def _pattern(token: AddedToken) -> str:
    word = rf"(?<!\w){re.escape(token.text)}(?!\w)" if token.single_word else re.escape(token.text)
    return r"\s*" * token.lstrip + word + r"\s*" * token.rstrip
