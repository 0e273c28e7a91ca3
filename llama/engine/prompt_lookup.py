"""Prompt lookup: guess the next tokens of a text from what followed the same tokens earlier in it.

If the last n tokens of a prompt and its answer occur earlier, the tokens that followed there are the guesses. This needs no
second model, and guesses well where answers repeat their prompt: summaries, edits of code, questions about a text.
"""

import itertools
import operator

MAX_MATCH = 5  # the longest match that is looked for, in tokens
# How likely a guess is right at first, after a match of 1, 2, ... tokens, and how many observations that is worth.
FIRST_CHANCES = (0.1, 0.3, 0.45, 0.55, 0.65)
FIRST_WEIGHT = 4.0
FIRST_CHANCE = 0.7  # the same for the guesses of a draft model
DECAY = 0.95  # what an observation counts for, compared with the next one


class Chance:
    """Estimate how likely guesses are right, from those so far. Recent ones count more."""

    def __init__(self, first: float, weight: float = FIRST_WEIGHT) -> None:
        self.hits, self.trials = first * weight, weight

    def record(self, is_right: bool) -> None:
        self.hits, self.trials = self.hits * DECAY + is_right, self.trials * DECAY + 1

    @property
    def value(self) -> float:
        return self.hits / self.trials


class PromptLookup:
    """The tokens of a prompt and its answer so far, indexed by the n tokens before each, for n = 1 to MAX_MATCH.

    match: the longest match of the last tokens, in tokens; 0 if there is none. source: index of the token that followed it.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: list[int] = []
        # One dict for each n: it maps n tokens to the index of the token that followed them last.
        self.following: list[dict[tuple[int, ...], int]] = [{} for _ in range(MAX_MATCH)]
        self.chances = [Chance(first) for first in FIRST_CHANCES]
        for token in tokens:
            self._index(token)
        self.match, self.source = self._longest_match()

    def append(self, token: int) -> None:
        """Add the next token, and learn from it how likely guesses are right."""
        if self.match:
            self.chances[self.match - 1].record(self.tokens[self.source] == token)
        self._index(token)
        self.match, self.source = self._longest_match()

    def _index(self, token: int) -> None:
        end = len(self.tokens)
        for n, following in enumerate(self.following[:end], 1):
            following[tuple(self.tokens[end - n :])] = end
        self.tokens.append(token)

    def _longest_match(self) -> tuple[int, int]:
        for n in range(min(MAX_MATCH, len(self.tokens)), 0, -1):
            if source := self.following[n - 1].get(tuple(self.tokens[-n:])):
                return n, source
        return 0, 0

    def expected(self, limit: int) -> list[float]:
        """Return for each of the next guesses, at most `limit`, the chance that it and all guesses before it are right."""
        lengths = range(self.match, self.match + limit) if self.match else range(0)
        return [*itertools.accumulate((self.chances[min(n, MAX_MATCH) - 1].value for n in lengths), operator.mul)]

    def guess(self, n: int) -> list[int]:
        """Return n guesses; none without a match. What followed the match is taken to repeat if it is too short."""
        known = self.tokens[self.source :]
        return [known[i % len(known)] for i in range(n)] if self.match else []
