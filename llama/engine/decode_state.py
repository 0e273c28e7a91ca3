"""The state of a batch between two decode steps: tensors on the device with an entry for each row."""

import torch

from ..distributed.agreement import broadcast_from_rank0
from ..distributed.groups import model_parallel
from ..sampling import Sampler, SamplingParams, apply_repetition_penalty, sample, sample_top_p, seeded_exponential
from .requests import Request


class DecodeState:
    """Logits, positions, seeds and seen tokens of B rows, on the device."""

    def __init__(
        self, n: int, vocab: int, device: torch.device, sampling: SamplingParams, seeded: bool, sampler: Sampler = sample_top_p
    ) -> None:
        self.sampling, self.sampler = sampling, sampler
        self.logits = torch.zeros(n, vocab, dtype=torch.float32, device=device)
        # For each row: position of the next token to sample, and position of the last token that the request allows.
        self.positions = self.last_positions = torch.zeros(n, dtype=torch.int64, device=device)
        self.seeds = torch.zeros_like(self.positions) if seeded and not sampling.greedy else None
        self.seen = torch.zeros(n, vocab, dtype=torch.bool, device=device) if sampling.repetition_penalty != 1 else None

    def admit(self, rows: list[int], requests: list[Request], logits: torch.Tensor) -> None:
        """Put prefilled requests into free rows. logits: for the first new token of each request, (len(rows), vocab)."""
        index = torch.tensor(rows, device=logits.device)

        def put(old: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return old.index_copy(0, index, values.to(old.device))

        lengths, limits = torch.tensor([(len(r.prompt), r.max_new_tokens) for r in requests], device="cpu").unbind(1)
        last = lengths + limits - 1
        self.logits = put(self.logits, logits)
        self.last_positions = put(self.last_positions, last)
        self.positions = put(self.positions, torch.minimum(lengths, last))
        if self.seeds is not None:
            self.seeds = put(self.seeds, torch.tensor([r.seed for r in requests], dtype=torch.int64, device="cpu"))
        if self.seen is not None:
            seen = torch.zeros(len(requests), self.seen.shape[1], dtype=torch.bool, device="cpu")
            for row, request in zip(seen, requests, strict=True):
                row[request.prompt] = True
            self.seen = put(self.seen, seen)

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the next token of each row. Return these tokens (B,), and the largest logit of each row (B,).

        All ranks return the values of rank 0. The largest logit of a row is not finite if the row contains NaN or +inf, or
        only -inf.
        """
        logits, noise = self.logits, None
        if self.seen is not None:
            logits = apply_repetition_penalty(logits, self.seen, self.sampling.repetition_penalty)
        if self.seeds is not None:
            noise = seeded_exponential(self.seeds, self.positions, logits.shape[1])
        tokens, largest = sample(logits, self.sampling, noise, self.sampler), self.logits.amax(-1)
        if model_parallel()[1] > 1:
            of_rank0, largest = broadcast_from_rank0(torch.stack([tokens.double(), largest.double()])).unbind()
            tokens = of_rank0.long()
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens, largest

    def advance(self) -> None:
        """Increase the position of each row by 1, up to the last position that its request allows."""
        self.positions = torch.minimum(self.positions + 1, self.last_positions)
