"""The prefix cache: prompts that begin with the same tokens share the computation of these tokens.

A row of the KV cache keeps the keys and values of its last prompt after the answer has ended. A new prompt that begins with the
same tokens copies them into its own row, and prefills only the rest. Rows that no request uses keep prompts that other rows had
to give up; the prompt that has not been used for the longest time is overwritten first.

Only tokens of prompts are shared, not those of answers: a decode step rounds keys and values differently from a prefill, so
logits would depend on what was computed before. For the same reason, some prompts share only whole blocks of tokens: see
`EngineForward.prefix_multiple`.
"""

from collections.abc import Collection

import torch

from .. import tuning
from .checks import common_prefix_length


class PrefixCache:
    """Which prompt tokens the rows of a KV cache hold. data: (n_layers, 2, rows, n_kv_heads, positions, head_dim)."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.tokens: list[list[int]] = [[] for _ in range(data.shape[2])]  # of each row: those at positions 0, 1, ...
        self.last_used = [0] * len(self.tokens)  # of each row: the value of n_uses at its last use
        self.n_uses = 0

    def clear(self) -> None:
        """Forget the tokens of all rows."""
        self.tokens = [[] for _ in self.tokens]

    def hold(self, row: int, tokens: list[int]) -> None:
        """Record that a row holds the keys and values of these tokens, and mark it as used now."""
        self.tokens[row] = tokens
        self.n_uses += 1
        self.last_used[row] = self.n_uses

    def find(self, prompt: list[int], limit: int, multiple: int, row: int) -> tuple[int, int]:
        """Return the row that shares the most leading tokens with a prompt, and their number. `row` itself wins a tie.

        limit, multiple: see `n_shared`.
        """
        shared = [n_shared(tokens, prompt, limit, multiple) for tokens in self.tokens]
        source = max(range(len(shared)), key=lambda each: (shared[each], each == row))
        return source, shared[source]

    def copy(self, source: int, row: int, n: int) -> None:
        """Copy the keys and values of the first n tokens into another row, which is then recorded as holding no tokens."""
        self.tokens[row] = []  # first, since Ctrl-C may interrupt the copy
        self.data[:, :, row, :, :n] = self.data[:, :, source, :, :n]

    def take(self, row: int, source: int, n: int, spare: Collection[int]) -> int | None:
        """Make a row hold the first n tokens of the row `source`, and save what it held before in one of the rows `spare`.

        Return the row of the saved tokens. Return None if nothing was saved, because `row` would have lost only few tokens, or
        because all rows of `spare` were used more recently.
        """
        saved, held, taken = None, self.tokens[row], self.tokens[source][:n]
        candidates = [each for each in spare if each != source and self.last_used[each] < self.last_used[row]]
        if len(held) - (n if source == row else 0) >= tuning.MIN_SAVED_PREFIX and candidates:
            saved = min(candidates, key=lambda each: (bool(self.tokens[each]), self.last_used[each]))
            self.copy(row, saved, len(held))
            self.tokens[saved], self.last_used[saved] = held, self.last_used[row]
        if n and source != row:
            self.copy(source, row, n)
            self.hold(source, self.tokens[source])
        self.hold(row, taken)
        return saved


def n_shared(tokens: list[int], prompt: list[int], limit: int, multiple: int) -> int:
    """Return how many leading tokens of a prompt, at most `limit`, can be taken from a row that holds `tokens`.

    The number is a multiple of `multiple`, and 0 if there are too few to be worth a copy.
    """
    least = tuning.MIN_SHARED_PREFIX
    if limit < least or tokens[:least] != prompt[:least]:
        return 0
    n = min(common_prefix_length(tokens, prompt), limit)
    return n - n % multiple
