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
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..distributed.agreement import broadcast_from_rank0
from ..distributed.groups import model_parallel, world_size
from .backend import DecodeRunsFn, Run
from .draft import DraftGuesser
from .prompt_lookup import PromptLookup
from .requests import Request
from .step_costs import MAX_LATER, LossLimit, StepCosts

MAX_GUESSES = 7  # of a row in one step
MIN_CHANCE = 0.05  # guesses that are less likely right are not considered
MIN_GAIN = 1.03  # guesses are used if they are expected to multiply the speed by this, since expectations are not exact


class Guesser(Protocol):
    """What guesses the next tokens of rows."""

    def admit(self, row: int, request: Request) -> None: ...

    def release(self, row: int) -> None: ...

    def append(self, row: int, token: int) -> None:
        """Add the token that has been sampled for a row."""

    def is_ready(self) -> bool:
        """Return True if guesses can be made now; the same on all ranks."""

    def expected(self, row: int, limit: int) -> list[float]:
        """Return for each of the next guesses, at most `limit`, the chance that it and all guesses before it are right."""

    def seconds(self, n: int) -> float:
        """Return how long it takes to make up to n guesses for each row."""

    def first_seconds(self, row: int) -> float:
        """Return how long it takes to prepare the first guess of a row, as a share of what later guesses gain by it."""

    def guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Return guesses, as many as `counts` says for each row, or fewer."""


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

    def is_ready(self) -> bool:
        return True

    def expected(self, row: int, limit: int) -> list[float]:
        return self.lookups[row].expected(limit)

    def seconds(self, n: int) -> float:
        return 0.0

    def first_seconds(self, row: int) -> float:
        return 0.0

    def guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        return {row: self.lookups[row].guess(n) for row, n in counts.items()}


class CheckedRow:
    """A row whose guesses have been computed: the guesses, and the logits after each of them (n, vocab)."""

    def __init__(self, guesses: list[int], logits: torch.Tensor) -> None:
        self.guesses, self.logits, self.n_right = guesses, logits, 0

    def accept(self, token: int) -> torch.Tensor | None:
        """Return the logits after a sampled token if it is the next guess, otherwise None."""
        if self.n_right == len(self.guesses) or self.guesses[self.n_right] != token:
            return None
        self.n_right += 1
        return self.logits[self.n_right - 1]


def choose_counts(
    expected: Mapping[int, Sequence[float]],
    n_decoding: int,
    step_seconds: Callable[[int, int], float],
    guess_seconds: Callable[[int, int], float] = lambda row, n: 0.0,
) -> dict[int, int]:
    """Return how many guesses of each row to compute, so that most tokens per second can be expected. Leave out rows with none.

    expected: for each row, the chances that the first guess is right, the first two, and so on. n_decoding: number of all rows
    that decode, those without guesses included. step_seconds: how long a step takes, given the number of all guesses, and the
    largest number in a row. guess_seconds: how much longer guessing takes for the nth guess of a row; called in order.
    """
    counts, n_tokens, longest, guessing = dict[int, int](), float(n_decoding), 0, 0.0
    best, best_rate = 0, MIN_GAIN * n_decoding / step_seconds(0, 0)
    chances = [(chance, row) for row, each in expected.items() for chance in each if chance > MIN_CHANCE]
    # The sort is stable, and the chances of a row only fall: so its guesses stay in order.
    chances.sort(key=operator.itemgetter(0), reverse=True)
    for n_guesses, (chance, row) in enumerate(chances, 1):
        counts[row] = n = counts.get(row, 0) + 1
        n_tokens, longest = n_tokens + chance, max(longest, n)
        guessing += guess_seconds(row, n)
        if (rate := n_tokens / (step_seconds(n_guesses, longest) + guessing)) > best_rate:
            best, best_rate = n_guesses, rate
    counts = {}
    for _, row in chances[:best]:
        counts[row] = counts.get(row, 0) + 1
    return counts


class BegunStep(NamedTuple):
    """A decode step that has begun.

    n_rows: rows that it computes. n_decoding: those with an answer that goes on. n_guesses: guesses of all rows. n_computed:
    the number of tokens that the backend computes, with padding. guessing: seconds that guessing took before the step. began:
    the value of `time.perf_counter()` at its beginning.
    """

    n_rows: int
    n_decoding: int
    n_guesses: int
    n_computed: int
    guessing: float
    began: float


class Speculation:
    """The guesses for the rows of a batch.

    decode_runs: decodes several tokens of a row. n_computed: see `Backend`. costs, loss_limit: learned from all steps of the
    model.
    """

    def __init__(
        self,
        decode_runs: DecodeRunsFn,
        n_computed: Callable[[int, int, int], int],
        costs: StepCosts,
        loss_limit: LossLimit,
    ) -> None:
        self.decode_runs, self.n_computed, self.costs = decode_runs, n_computed, costs
        self.guessers: dict[Any, Guesser] = {}  # by draft model; None for prompt lookup
        self.rows: dict[int, tuple[Guesser, Request]] = {}  # those that speculate
        self.checked: dict[int, CheckedRow] = {}  # those whose guesses have been computed, and not been used up
        self.loss_limit, self.n_accepted = loss_limit, 0  # n_accepted: guesses of the last step that were right

    def admit(self, row: int, request: Request, draft: Any) -> None:
        """Begin to guess the answer to a request, with a draft model, or by prompt lookup if `draft` is None."""
        if draft not in self.guessers:
            self.guessers[draft] = LookupGuesser() if draft is None else DraftGuesser(draft.engine)
        self.guessers[draft].admit(row, request)
        self.rows[row] = self.guessers[draft], request

    def release(self, row: int) -> None:
        """Stop guessing in a row."""
        if row in self.rows:
            self.rows.pop(row)[0].release(row)
            self.checked.pop(row, None)

    def append(self, row: int, token: int) -> None:
        """Add the token that has been sampled for a row, if it speculates."""
        if row in self.rows:
            self.rows[row][0].append(row, token)

    def guess(self, limits: Mapping[int, int], n_decoding: int, device: torch.device) -> dict[int, list[int]]:
        """Return guesses for rows. limits: all rows of a step, with the largest number of guesses that each may have.

        n_decoding: number of rows whose answers go on; a step computes the other rows, too. All ranks return the same guesses.
        """
        counts = self._counts(limits, n_decoding)
        if model_parallel()[1] > 1:  # ranks measure different times
            asked = torch.tensor([counts.get(row, 0) for row in limits], device=device)
            counts = {row: n for row, n in zip(limits, broadcast_from_rank0(asked).tolist(), strict=True) if n}
        guesses = dict[int, list[int]]()
        for guesser in {id(self.rows[row][0]): self.rows[row][0] for row in counts}.values():
            guesses |= self._try_guess(guesser, {row: n for row, n in counts.items() if self.rows[row][0] is guesser})
        return {row: each for row, each in guesses.items() if each}

    def _try_guess(self, guesser: Guesser, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Return guesses. Go on without a draft model that fails, since answers do not need its guesses."""
        try:
            return guesser.guess(counts)
        except Exception as e:
            if world_size() > 1:
                raise
            why = f"{type(e).__name__}: {e}"
            print(f"llama: the draft model has failed ({why}): its answers go on without guesses", file=sys.stderr)
        for row in [row for row, (each, _) in self.rows.items() if each is guesser]:
            self.release(row)
        return {}

    def _counts(self, limits: Mapping[int, int], n_decoding: int) -> dict[int, int]:
        in_use = {id(guesser): guesser for guesser, _ in self.rows.values()}
        ready = [guesser for guesser in in_use.values() if guesser.is_ready()]
        expected = {
            row: guesser.expected(row, min(limits[row], MAX_GUESSES))
            for row, (guesser, _) in self.rows.items()
            if guesser in ready
        }
        n_rows = len(limits)
        plain = self.n_computed(n_rows, 0, 0)
        if not any(expected.values()) or not self.costs.known(plain):
            return {}
        if not self.loss_limit.allows_guesses(self.costs.seconds(plain)):
            return {}
        longest = dict.fromkeys(map(id, ready), 0)  # the largest number of guesses in a row, by guesser

        def guess_seconds(row: int, n: int) -> float:
            guesser = self.rows[row][0]
            first = guesser.first_seconds(row) if n == 1 else 0.0
            if n <= longest[id(guesser)]:
                return first
            longest[id(guesser)] = n
            return first + guesser.seconds(n) - guesser.seconds(n - 1)

        return choose_counts(
            expected,
            n_decoding,
            lambda n_guesses, longest: self.costs.seconds(self.n_computed(n_rows, n_guesses, longest)),
            guess_seconds,
        )

    def decode(self, runs: Sequence[Run]) -> torch.Tensor:
        """Decode the last token of each row and its guesses. Return the logits (len(runs), vocab) after the last tokens."""
        logits, firsts, n = self.decode_runs(runs), list[int](), 0
        self.n_accepted = 0
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
                self.n_accepted += 1
                accepted[row] = logits
        return accepted

    def record(self, step: BegunStep, seconds: float) -> None:
        """Record that a step has taken so many seconds."""
        self.costs.record(step.n_computed, seconds)
        seconds = min(seconds, MAX_LATER * self.costs.seconds(step.n_computed)) + step.guessing
        plain = self.costs.seconds(self.n_computed(step.n_rows, 0, 0))
        self.loss_limit.record(seconds, plain * (1 + self.n_accepted / step.n_decoding) if step.n_guesses else seconds)
