"""Prefill: run prompts through the engine's forward, side by side and in chunks."""

import itertools
from collections.abc import Callable

import torch

from .. import tuning
from ..distributed.progress import progress
from ..sampling import token_logprobs
from .forward import EngineForward
from .kv_cache import RaggedBatch, prefill_chunks
from .requests import Request


class Prefill:
    """Prefill rows of the KV cache with prompts, in chunks of at most max_tokens tokens, counted over all prompts.

    start: number of leading prompt tokens to skip, as they are in the cache already. quiet: show no progress.
    `last_hidden` and `logprobs` are complete after the last chunk. scored: compute `logprobs`.
    """

    def __init__(
        self,
        forward: EngineForward,
        rows: list[int],
        requests: list[Request],
        start: int,
        scored: bool,
        max_tokens: int,
        quiet: bool,
    ) -> None:
        self.forward, self.rows, self.start, self.scored = forward, rows, start, scored
        prompts = [request.prompt[start:] for request in requests]
        self.lengths = [len(prompt) for prompt in prompts]
        self.tokens = torch.tensor([token for prompt in prompts for token in prompt] + [0], device=forward.device)
        self.n_cached = dict.fromkeys(rows, start)  # for each row, the number of tokens that are in the cache
        self.n_read, self.hidden, self.values = 0, list[torch.Tensor](), [0.0]
        chunks = list(prefill_chunks(self.lengths, max_tokens, tuning.ATTENTION_CHUNK))
        bar = progress(chunks, lambda chunk: sum(n for _, _, n in chunk), "reading prompts", "tokens")
        self.chunks = iter(chunks if quiet else bar)
        self.next_chunk = next(self.chunks, None)

    @property
    def finished(self) -> bool:
        """Return True after the last chunk."""
        return self.next_chunk is None

    def run_chunk(self) -> None:
        """Run the next chunk."""
        pieces, device = self.next_chunk or [], self.forward.device
        ends = list(itertools.accumulate(n for _, _, n in pieces))
        batch = RaggedBatch.from_segments([(self.rows[i], self.start + done, n) for i, done, n in pieces], device)
        final = [end - 1 for end, (i, done, n) in zip(ends, pieces, strict=True) if done + n == self.lengths[i]]
        final_indices = torch.tensor(final, dtype=torch.int64, device=device)
        needed, first = None if self.scored else final_indices, self.n_read
        hidden = self.forward.hidden_states(self.tokens[first : first + ends[-1]], batch, logits_indices=needed)
        if self.scored:
            self.values += score_tokens(self.forward.logits, hidden, self.tokens[first + 1 :])
            hidden = hidden[final_indices]
        self.hidden.append(hidden)
        self.n_read += ends[-1]
        for i, done, n in pieces:
            self.n_cached[self.rows[i]] = self.start + done + n
        self.next_chunk = next(self.chunks, None)

    @property
    def last_hidden(self) -> torch.Tensor:
        """Return the hidden state of the last token of each prompt, (B, dim)."""
        return torch.cat(self.hidden)

    @property
    def logprobs(self) -> list[list[float]]:
        """Return the log probability of each token of each prompt, 0.0 for the first; empty lists without `scored`."""
        starts = itertools.accumulate(self.lengths, initial=0)
        return [[0.0, *self.values[i + 1 : i + n]] if self.scored else [] for i, n in zip(starts, self.lengths, strict=False)]


def score_tokens(logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, following: torch.Tensor) -> list[float]:
    """Return the log probability of each token `following[i]`, given the hidden state `hidden[i]`. hidden: (N, dim)."""
    logprobs: list[float] = []
    for i in range(0, len(hidden), tuning.LOGPROB_CHUNK):
        chunk = logits(hidden[i : i + tuning.LOGPROB_CHUNK])
        logprobs += token_logprobs(chunk, following[i : i + len(chunk)]).tolist()
    return logprobs
