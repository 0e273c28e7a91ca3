"""Prefill: run prompts through the engine's forward, side by side and in chunks."""

import itertools
from collections.abc import Callable

import torch

from .. import tuning
from ..distributed.progress import progress
from ..sampling import ranked_logprobs
from .forward import EngineForward
from .kv_cache import RaggedBatch, prefill_chunks
from .requests import Request, TokenScore, token_score


class Prefill:
    """Prefill rows of the KV cache with prompts, in chunks of at most max_tokens tokens, counted over all prompts.

    start: number of leading prompt tokens to skip, as they are in the cache already. quiet: show no progress.
    `last_hidden` and `scores` are complete after the last chunk. scored: compute `scores`, with the `n_top[i]` likeliest tokens
    at each position of prompt i.
    """

    def __init__(
        self,
        forward: EngineForward,
        rows: list[int],
        requests: list[Request],
        start: int,
        scored: bool,
        n_top: list[int],
        max_tokens: int,
        quiet: bool,
    ) -> None:
        self.forward, self.rows, self.start, self.scored, self.n_top = forward, rows, start, scored, n_top
        prompts = [request.prompt[start:] for request in requests]
        self.lengths = [len(prompt) for prompt in prompts]
        self.tokens = torch.tensor([token for prompt in prompts for token in prompt] + [0], device=forward.device)
        self.n_cached = dict.fromkeys(rows, start)  # for each row, the number of tokens that are in the cache
        self.n_read, self.hidden, self.values = 0, list[torch.Tensor](), [TokenScore()]
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
            self.values += score_tokens(self.forward.logits, hidden, self.tokens[first + 1 :], max(self.n_top))
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
    def scores(self) -> list[list[TokenScore]]:
        """Return the score of each token of each prompt, 0.0 for the first; empty lists without `scored`."""
        scores = list[list[TokenScore]]()
        for i, n, n_top in zip(itertools.accumulate(self.lengths, initial=0), self.lengths, self.n_top, strict=False):
            following = self.values[i + 1 : i + n] if self.scored else []
            cut = [TokenScore(logprob, top[:n_top] if top and n_top else None) for logprob, top in following]
            scores.append([TokenScore(0.0, [] if n_top else None), *cut] if self.scored else [])
        return scores


def score_tokens(
    logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, following: torch.Tensor, n_top: int = 0
) -> list[TokenScore]:
    """Return the score of each token `following[i]`, given the hidden state `hidden[i]`. hidden: (N, dim)."""
    scores: list[TokenScore] = []
    for i in range(0, len(hidden), tuning.LOGPROB_CHUNK):
        chunk = logits(hidden[i : i + tuning.LOGPROB_CHUNK])
        values = [each.tolist() for each in ranked_logprobs(chunk, following[i : i + len(chunk)], n_top)]
        scores += [token_score(values, j, n_top) for j in range(len(chunk))]
    return scores
