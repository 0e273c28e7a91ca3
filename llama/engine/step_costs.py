"""What decode steps cost: the time of a step by the number of tokens that it computes, learned from the steps themselves."""

import statistics

FIRST_SLOPE = 0.05  # what one more token is taken to add to the time of a step of one token, before it has been measured
KEPT = 7  # times that are kept for each number of tokens; their median counts


class StepCosts:
    """The times of decode steps, by the number of tokens in a step."""

    def __init__(self) -> None:
        self.begun: set[int] = set()
        self.times: dict[int, list[float]] = {}

    def record(self, n_tokens: int, seconds: float) -> None:
        """Record the time of a step. The first one of each size does not count, since it allocates memory or compiles code."""
        if n_tokens not in self.begun:
            self.begun.add(n_tokens)
            return
        times = self.times.setdefault(n_tokens, [])
        times.append(seconds)
        del times[:-KEPT]

    def known(self, n_tokens: int) -> bool:
        """Return True if enough steps of this size have been recorded, three or more, to rely on `seconds`."""
        return len(self.times.get(n_tokens, [])) >= 2

    def seconds(self, n_tokens: int) -> float:
        """Return how long a step takes; estimated from the next smaller and larger ones, if its size has not been measured.

        Before any step has been measured, the time of a step of one token is 1.
        """
        if n_tokens in self.times:
            return statistics.median(self.times[n_tokens])
        smaller = max((n for n in self.times if n < n_tokens), default=None)
        larger = min((n for n in self.times if n > n_tokens), default=None)
        if smaller is None and larger is None:
            return 1 + FIRST_SLOPE * (n_tokens - 1)
        if smaller is not None and larger is not None:
            low, high = self.seconds(smaller), self.seconds(larger)
            return low + (high - low) * (n_tokens - smaller) / (larger - smaller)
        nearest = smaller if smaller is not None else larger
        assert nearest is not None
        return self.seconds(nearest) * (1 + FIRST_SLOPE * (n_tokens - 1)) / (1 + FIRST_SLOPE * (nearest - 1))
