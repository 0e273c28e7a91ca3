"""The state of a batch between two decode steps: tensors on the device with an entry for each row."""

from typing import NamedTuple

import torch

from ..distributed.agreement import broadcast_from_rank0
from ..distributed.groups import model_parallel
from ..sampling import (
    Sampler,
    SamplingParams,
    apply_repetition_penalty,
    bias_of_tokens,
    sample,
    sample_top_p,
    seeded_exponential,
)
from .requests import Request


class SamplingOptions(NamedTuple):
    """Describe how the tokens of a row are sampled. Rows with equal options are sampled together."""

    params: SamplingParams
    sampler: Sampler = sample_top_p
    seeded: bool = False


class DecodeState:
    """Logits, positions, seeds, seen tokens and logit biases of B rows, on the device."""

    def __init__(self, n: int, vocab: int, device: torch.device) -> None:
        self.logits = torch.zeros(n, vocab, dtype=torch.float32, device=device)
        # For each row: position of the next token to sample, and position of the last token that the request allows.
        self.positions = self.last_positions = torch.zeros(n, dtype=torch.int64, device=device)
        self.seeds = torch.zeros_like(self.positions)
        # None, or for each row and token: True if the token is in the prompt or the answer, for a repetition penalty.
        self.seen: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None  # None, or for each row and token: what a logit bias adds to the logit
        self.options: dict[int, SamplingOptions] = {}  # maps each row that is in use to its options
        self._groups: list[tuple[SamplingOptions, torch.Tensor]] | None = None
        self.failures: list[tuple[list[int], Exception]] = []  # of the last `sample`, with the rows that they concern

    def resize(self, n: int) -> None:
        """Change the number of rows to n. New rows contain zeros."""

        def resized(old: torch.Tensor) -> torch.Tensor:
            return torch.cat([old[:n], old.new_zeros(max(0, n - len(old)), *old.shape[1:])])

        self.logits, self.positions, self.last_positions = map(resized, (self.logits, self.positions, self.last_positions))
        self.seeds, self.seen = resized(self.seeds), None if self.seen is None else resized(self.seen)
        self.bias = None if self.bias is None else resized(self.bias)
        self._groups = None

    def admit(self, rows: list[int], requests: list[Request], options: list[SamplingOptions], logits: torch.Tensor) -> None:
        """Put prefilled requests into free rows. logits: for the first new token of each request, (len(rows), vocab)."""
        index = torch.tensor(rows, device=logits.device)

        def put(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return old.index_copy(0, index, values.to(old.device))

        lengths, limits = torch.tensor([(len(r.prompt), r.max_new_tokens) for r in requests], device="cpu").unbind(1)
        last = lengths + limits - 1
        self.logits = put(self.logits, logits)
        self.last_positions = put(self.last_positions, last)
        self.positions = put(self.positions, torch.minimum(lengths, last))
        if any(each.seeded for each in options):
            self.seeds = put(self.seeds, torch.tensor([r.seed or 0 for r in requests], dtype=torch.int64, device="cpu"))
        penalized = [each.params.repetition_penalty != 1 for each in options]
        if any(penalized):
            seen = torch.zeros(len(requests), logits.shape[1], dtype=torch.bool, device="cpu")
            for row, request in zip(seen, requests, strict=True):
                row[request.prompt] = True
            self.seen = put(torch.zeros_like(self.logits, dtype=torch.bool) if self.seen is None else self.seen, seen)
        biases = [each.params.logit_bias for each in options]
        if any(biases):
            bias = torch.stack([bias_of_tokens(each, logits.shape[1]) for each in biases])
            self.bias = put(torch.zeros_like(self.logits) if self.bias is None else self.bias, bias)
        self.options.update(zip(rows, options, strict=True))
        self._groups = None

    def set_positions(self, rows: list[int], positions: list[int]) -> None:
        """Set the positions at which decode steps compute rows that do not decode."""
        if not rows:
            return
        index, value = torch.tensor(rows, device="cpu"), torch.tensor(positions, device="cpu")
        for name in ("positions", "last_positions"):
            old = getattr(self, name)
            setattr(self, name, old.index_copy(0, index.to(old.device), value.to(old.device)))

    def release(self, row: int) -> None:
        """Free a row. It may still be sampled together with the other rows; its tokens are ignored."""
        del self.options[row]
        self._groups = None

    def sample(self, options: SamplingOptions | None = None, keep_failures: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the next token of each row. Return these tokens (B,), and the largest logit of each row (B,).

        options: those of all rows; by default, each row has its own. If all rows in use have equal options, free rows are
        sampled with them, so that each step of a call uses the same number of random numbers from torch's default generator.
        keep_failures: collect the exceptions of callers' samplers in `failures`, with the rows that they concern, instead of
        raising them.
        All ranks return the values of rank 0. The largest logit of a row is not finite if the row contains NaN or +inf, or
        only -inf.
        """
        largest, groups = self.logits.amax(-1), [] if options else self._rows_by_options()
        self.failures = []
        if options or (len(groups) == 1 and not keep_failures):
            tokens = self._sample_rows(options or groups[0][0], slice(None))
        else:
            tokens = torch.zeros_like(self.positions)
            for each, rows in groups:
                if (sampled := self._try_sample_rows(each, rows, keep_failures)) is not None:
                    tokens = tokens.index_copy(0, rows, sampled)
        if model_parallel()[1] > 1:
            of_rank0, largest = broadcast_from_rank0(torch.stack([tokens.double(), largest.double()])).unbind()
            tokens = of_rank0.long()
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens, largest

    def _rows_by_options(self) -> list[tuple[SamplingOptions, torch.Tensor]]:
        """Return the different options of the rows, each with the indices of its rows."""
        if self._groups is None:
            by_options: dict[SamplingOptions, list[int]] = {}
            for row, options in sorted(self.options.items()):
                by_options.setdefault(options, []).append(row)
            device = self.logits.device
            self._groups = [(options, torch.tensor(rows, device=device)) for options, rows in by_options.items()]
        return self._groups

    def _try_sample_rows(self, options: SamplingOptions, rows: torch.Tensor, keep_failures: bool) -> torch.Tensor | None:
        """Sample a token for each of some rows. With `keep_failures`, return None after an exception, and collect it."""
        try:
            return self._sample_rows(options, rows)
        except Exception as e:
            if not keep_failures:
                raise
            self.failures.append((rows.tolist(), e))
            return None

    def _sample_rows(self, options: SamplingOptions, rows: torch.Tensor | slice) -> torch.Tensor:
        """Sample a token for each of some rows, which have equal options."""
        logits, noise = self.logits[rows], None
        if options.params.logit_bias and self.bias is not None:
            logits = logits + self.bias[rows]
        if options.params.repetition_penalty != 1 and self.seen is not None:
            logits = apply_repetition_penalty(logits, self.seen[rows], options.params.repetition_penalty)
        if options.seeded and not options.params.greedy:
            noise = seeded_exponential(self.seeds[rows], self.positions[rows], logits.shape[1])
        return sample(logits, options.params, noise, options.sampler)

    def advance(self) -> None:
        """Increase the position of each row by 1, up to the last position that its request allows."""
        self.positions = torch.minimum(self.positions + 1, self.last_positions)
