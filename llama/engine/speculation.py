"""Speculation: guess the next tokens of a row, compute all of them in one decode step, and keep those that are right.

A decode step reads all weights, and a few more tokens cost hardly more time. So a step may compute, besides the last token of a
row, guesses of the tokens after it. Each token is then sampled exactly as without guesses, from the logits after the tokens
before it. As long as the sampled token is the next guess, the logits after it are there already; at the first that is not, the
rest of the guesses is dropped. So guesses change how fast tokens come, but not which.

    step     computed tokens           sampled
    1        a                         b            "a" is the last token of the prompt
    2        b, guesses c d x          c d e        "c" and "d" are right; after them "e" is sampled, not "x"
    3        e, guesses f g            ...          overwrites the keys and values of "x", which nobody has read
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..distributed.agreement import broadcast_from_rank0
from ..distributed.groups import model_parallel
from .backend import DecodeRunsFn, Run
from .draft import DraftGuesser
from .prompt_lookup import PromptLookup
from .requests import Request
from .step_costs import StepCosts

if TYPE_CHECKING:
    from .engine import Engine

MAX_GUESSES = 7  # of a row in one step
MIN_GAIN = 1.03  # guesses are used if they are expected to multiply the speed by this, since expectations are not exact


class Guesser(Protocol):
    """What guesses the next tokens of rows."""

    def admit(self, row: int, request: Request) -> None: ...

    def release(self, row: int) -> None: ...

    def append(self, row: int, token: int) -> None:
        """Add the token that has been sampled for a row."""

    def expected(self, row: int, limit: int) -> list[float]:
        """Return for each of the next guesses, at most `limit`, the chance that it and all guesses before it are right."""

    def seconds(self, counts: Mapping[int, int]) -> float:
        """Return how long it takes to guess. counts: the number of guesses of each row."""

    def guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Return guesses, as many as `counts` says, or fewer."""


class LookupGuesser:
    """Guess by prompt lookup."""

    def __init__(self) -> None:
        self.lookups: dict[int, PromptLookup] = {}

    def admit(self, row: int, request: Request) -> None:
        self.lookups[row] = PromptLookup(request.prompt)

    def release(self, row: int) -> None:
        del self.lookups[row]

    def append(self, row: int, token: int) -> None:
        self.lookups[row].append(token)

    def expected(self, row: int, limit: int) -> list[float]:
        return self.lookups[row].expected(limit)

    def seconds(self, counts: Mapping[int, int]) -> float:
        return 0.0

    def guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        return {row: self.lookups[row].guess(n) for row, n in counts.items()}


class CheckedRow:
    """A row whose guesses have been computed: the guesses that are left, and the logits after each of them (n, vocab)."""

    def __init__(self, guesses: list[int], logits: torch.Tensor) -> None:
        self.guesses, self.logits, self.n_right = guesses, logits, 0

    def accept(self, token: int) -> torch.Tensor | None:
        """Return the logits after a sampled token if it is the next guess, otherwise None."""
        if self.n_right == len(self.guesses) or self.guesses[self.n_right] != token:
            return None
        self.n_right += 1
        return self.logits[self.n_right - 1]


def choose_counts(
    expected: Mapping[int, Sequence[float]], n_rows: int, seconds: Callable[[Mapping[int, int]], float]
) -> dict[int, int]:
    """Return how many guesses of each row to compute, so that most tokens per second can be expected. Leave out rows with none.

    expected: for each row, the chances that the first guess is right, the first two, and so on. n_rows: number of all rows that
    decode, those without guesses included. seconds: how long it takes to compute a step with these numbers of guesses.
    """
    counts, n_tokens = dict.fromkeys(expected, 0), float(n_rows)
    best, best_rate = dict[int, int](), MIN_GAIN * n_rows / seconds(counts)
    chances = [(chance, row) for row, each in expected.items() for chance in each]
    # The sort is stable, and the chances of a row only fall: so its guesses stay in order.
    for chance, row in sorted(chances, key=operator.itemgetter(0), reverse=True):
        counts[row] += 1
        n_tokens += chance
        if (rate := n_tokens / seconds(counts)) > best_rate:
            best, best_rate = {row: n for row, n in counts.items() if n}, rate
    return best


class Speculation:
    """The guesses for the rows of a batch.

    decode_runs: decodes several tokens of a row. n_computed: the number of tokens that a step computes, given those of each
    row. costs: learned from all steps of the model.
    """

    def __init__(
        self,
        decode_runs: DecodeRunsFn,
        n_computed: Callable[[list[int]], int],
        costs: StepCosts,
        draft: "Engine | None" = None,
    ) -> None:
        self.decode_runs, self.n_computed, self.costs, self.draft = decode_runs, n_computed, costs, draft
        self.guessers: dict[str, Guesser] = {"prompt": LookupGuesser()}
        self.rows: dict[int, tuple[Guesser, Request]] = {}  # those that speculate
        self.checked: dict[int, CheckedRow] = {}  # those whose guesses have been computed, and not been used up

    def admit(self, row: int, request: Request, kind: str) -> None:
        """Begin to guess the answer to a request. kind: "prompt" or "draft"."""
        if kind == "draft" and "draft" not in self.guessers:
            assert self.draft is not None
            self.guessers["draft"] = DraftGuesser(self.draft)
        guesser = self.guessers[kind]
        guesser.admit(row, request)
        self.rows[row] = guesser, request

    def release(self, row: int) -> None:
        """Stop guessing in a row."""
        if row in self.rows:
            self.rows.pop(row)[0].release(row)
            self.checked.pop(row, None)

    def append(self, row: int, token: int) -> None:
        """Add the token that has been sampled for a row, if it speculates."""
        if row in self.rows:
            self.rows[row][0].append(row, token)

    def guess(self, limits: Mapping[int, int], device: torch.device) -> dict[int, list[int]]:
        """Return guesses for rows. limits: all rows of a step, with the largest number of guesses that each may have.

        All ranks return the same guesses.
        """
        expected = {row: self.rows[row][0].expected(row, min(n, MAX_GUESSES)) for row, n in limits.items() if row in self.rows}
        plain, counts = [1] * len(limits), dict[int, int]()
        if any(expected.values()) and self.costs.known(self.n_computed(plain)):

            def seconds(counts: Mapping[int, int]) -> float:
                lengths = [1 + n for n in counts.values()] + plain[len(counts) :]
                guessing = sum(each.seconds(n) for each, n in self._by_guesser(counts))
                return guessing + self.costs.seconds(self.n_computed(lengths))

            counts = choose_counts(expected, len(limits), seconds)
        if model_parallel()[1] > 1:  # ranks measure different times
            asked = torch.tensor([counts.get(row, 0) for row in limits], device=device)
            counts = {row: n for row, n in zip(limits, broadcast_from_rank0(asked).tolist(), strict=True) if n}
        guesses = dict[int, list[int]]()
        for guesser, own in self._by_guesser(counts):
            guesses |= guesser.guess(own)
        return {row: each for row, each in guesses.items() if each}

    def _by_guesser(self, counts: Mapping[int, int]) -> list[tuple[Guesser, dict[int, int]]]:
        """Divide numbers of guesses by what guesses them."""
        own = {name: {row: n for row, n in counts.items() if self.rows[row][0] is each} for name, each in self.guessers.items()}
        return [(self.guessers[name], counts) for name, counts in own.items() if any(counts.values())]

    def decode(self, runs: Sequence[Run]) -> torch.Tensor:
        """Decode the last token of each row and its guesses. Return the logits (len(runs), vocab) after the last tokens."""
        logits, firsts, n = self.decode_runs(runs), list[int](), 0
        for run in runs:
            firsts.append(n)
            n += len(run.tokens)
            if guesses := run.tokens[1:]:
                self.rows[run.row][1].num_guessed_tokens += len(guesses)
                self.checked[run.row] = CheckedRow(guesses, logits[firsts[-1] + 1 : n])
        return logits[firsts]

    def accept(self, tokens: Sequence[int]) -> dict[int, torch.Tensor]:
        """Compare the sampled token of each row with the guess of it. Return the logits after each token that was guessed."""
        accepted = dict[int, torch.Tensor]()
        for row, checked in [*self.checked.items()]:
            if (logits := checked.accept(tokens[row])) is None:
                del self.checked[row]
            else:
                self.rows[row][1].num_accepted_tokens += 1
                accepted[row] = logits
        return accepted
