"""Added tokens: tokens that a model has beside those of its vocabulary, and that are found in texts by their name."""

import re
from collections.abc import Iterable, Iterator

from ..checkpoint.hugging_face_settings import AddedToken


class AddedTokenFinder:
    """Find added tokens in a text: the leftmost first, and the longest of those that begin at the same place."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = sorted(tokens, key=lambda token: -len(token.text))
        self.by_text = {token.text: token for token in self.tokens}
        words = [rf"(?<!\w){re.escape(t.text)}(?!\w)" if t.single_word else re.escape(t.text) for t in self.tokens]
        self.pattern = re.compile("|".join(words)) if words else None
        texts = "|".join(re.escape(token.text) for token in self.tokens)
        self.start = re.compile(f"(?={texts})") if texts else None

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """Yield the parts of a text: the added tokens, and the texts before, between and after them, if not empty."""
        end = 0
        while match := self.pattern.search(text, end) if self.pattern else None:
            token = self.by_text[match[0]]
            before = text[end : match.start()].rstrip() if token.lstrip else text[end : match.start()]
            if before:
                yield before
            yield token
            end = _WHITE_SPACE.match(text, match.end()).end() if token.rstrip else match.end()  # type: ignore[union-attr]
        if end < len(text):
            yield text[end:]

    def starts(self, text: str) -> list[int]:
        """Return the places in a text where the text of a token begins; one token may begin within another."""
        return [match.start() for match in self.start.finditer(text)] if self.start else []


_WHITE_SPACE = re.compile(r"\s*")
