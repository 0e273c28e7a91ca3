"""What decode steps cost: the time of a step by the number of tokens that it computes, learned from the steps themselves.

What is expected of guesses may be wrong, so `LossLimit` counts what they have cost and gained.
"""

import statistics

FIRST_SLOPE = 0.1  # what one more token is taken to add to the time of a step of one token, before it has been measured
MAX_FIRST = 1.5  # limit of the first two times of each size, as a multiple of the estimate
MAX_LATER = 4.0  # the same for later times: something else may have held a step up
KEPT = 7  # times that are kept for each number of tokens; their median counts
MAX_LOSS = 0.015  # nothing is guessed while guesses have lost more than this share of the time of recent steps,
FIRST_LOSS = 0.35  # plus the time of this many steps without guesses, so that one wrong guess does not end the guessing
MAX_CREDIT = 0.1  # earlier gains make up for losses of at most this share of the time of recent steps
LOSS_DECAY = 0.99  # factor of the sums of `LossLimit` at each step, so that recent steps count more
MAX_AGE = 250  # steps after which a size that has not been used since is forgotten, and so is tried again if it may pay


class StepCosts:
    """The times of decode steps, by the number of tokens in a step."""

    def __init__(self) -> None:
        self.times: dict[int, list[float]] = {}
        self.medians: dict[int, float] = {}  # of these times
        self.repeated: set[int] = set()  # numbers of tokens of which more than one step has been recorded
        self.last_used: dict[int, int] = {}  # for each number of tokens, the value of n_records at its last step
        self.n_records = 0

    def record(self, n_tokens: int, seconds: float) -> None:
        """Record the time of a step. The first one of each size counts only until the second: it may have compiled code."""
        self.n_records += 1
        self.last_used[n_tokens] = self.n_records
        for size in [size for size, used in self.last_used.items() if used < self.n_records - MAX_AGE]:
            self.repeated.discard(size)
            del self.times[size], self.medians[size], self.last_used[size]
        if n_tokens in self.repeated:
            seconds = min(seconds, MAX_LATER * self.seconds(n_tokens))
            self._store(n_tokens, [*self.times[n_tokens], seconds][-KEPT:])
            return
        if n_tokens in self.times:
            self.repeated.add(n_tokens)
            del self.times[n_tokens], self.medians[n_tokens]
        self._store(n_tokens, [min(seconds, MAX_FIRST * self.seconds(n_tokens)) if self.times else seconds])

    def _store(self, n_tokens: int, times: list[float]) -> None:
        self.times[n_tokens], self.medians[n_tokens] = times, statistics.median(times)

    def known(self, n_tokens: int) -> bool:
        """Return True if at least three steps of this size have been recorded, so that `seconds` can be relied on."""
        return len(self.times.get(n_tokens, [])) >= 2  # the first time is not kept

    def seconds(self, n_tokens: int) -> float:
        """Return how long a step takes, estimated from steps of the next smaller and larger sizes if it has not been measured.

        Before any step has been measured, the time of a step of one token is 1.
        """
        if n_tokens in self.medians:
            return self.medians[n_tokens]
        if not self.times:
            return 1 + FIRST_SLOPE * (n_tokens - 1)
        sizes = sorted(self.times)
        if not sizes[0] < n_tokens:
            return self._scaled(sizes[0], n_tokens)
        smaller = max(size for size in sizes if size < n_tokens)
        low = self.seconds(smaller)
        if smaller != sizes[-1]:
            larger = sizes[sizes.index(smaller) + 1]
            return low + (self.seconds(larger) - low) * (n_tokens - smaller) / (larger - smaller)
        if len(sizes) == 1:
            return self._scaled(smaller, n_tokens)
        slope = (low - self.seconds(sizes[0])) / (smaller - sizes[0])
        return low + max(0.0, slope) * (n_tokens - smaller)

    def _scaled(self, known: int, n_tokens: int) -> float:
        """Estimate the time of a step from that of another size, by FIRST_SLOPE."""
        return self.seconds(known) * (1 + FIRST_SLOPE * (n_tokens - 1)) / (1 + FIRST_SLOPE * (known - 1))


class LossLimit:
    """Limit the time that wrong guesses lose to a share of the time of recent steps, whatever was expected of them.

    seconds: the time of recent steps. lost: how much longer steps with guesses took than steps without would have taken for the
    same tokens, in seconds; negative if they were faster. Both are sums with decay.
    """

    def __init__(self) -> None:
        self.seconds, self.lost = 0.0, 0.0

    def allows_guesses(self, step_seconds: float) -> bool:
        """Return True if guesses have not lost more than the limit. step_seconds: how long a step without guesses takes."""
        return self.lost <= MAX_LOSS * self.seconds + FIRST_LOSS * step_seconds

    def record(self, seconds: float, without_guesses: float) -> None:
        """Record a step's time in seconds. without_guesses: what its tokens would have taken without guesses.

        If the step had no guesses, without_guesses is `seconds`.
        """
        self.seconds = self.seconds * LOSS_DECAY + seconds
        # Gains are limited, so that a long series of right guesses is not followed by one as long of wrong ones.
        self.lost = max(self.lost * LOSS_DECAY + seconds - without_guesses, -MAX_CREDIT * self.seconds)
