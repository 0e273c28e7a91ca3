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


def prefill(
    forward: EngineForward, rows: list[int], requests: list[Request], start: int, scored: bool, quiet: bool
) -> tuple[torch.Tensor, list[list[float]]]:
    """Prefill rows of the KV cache with the prompts of requests, at most PREFILL_CHUNK tokens of all prompts at a time.

    start: number of leading prompt tokens to skip, as they are in the cache already. quiet: show no progress.
    Return the hidden state of the last token of each prompt, (B, dim), and a list of log probabilities for each prompt. With
    `scored`, the list has an entry for each token, 0.0 for the first; without `scored`, it is empty.
    """
    prompts, device = [request.prompt[start:] for request in requests], forward.device
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt] + [0], device=device)
    last_hidden, logprobs, first = [], [0.0], 0
    chunks = list(prefill_chunks(lengths, tuning.PREFILL_CHUNK, tuning.ATTENTION_CHUNK))
    bar = progress(chunks, lambda chunk: sum(n for _, _, n in chunk), "reading prompts", "tokens")
    for pieces in chunks if quiet else bar:
        ends = list(itertools.accumulate(n for _, _, n in pieces))
        batch = RaggedBatch.from_segments([(rows[i], start + done, n) for i, done, n in pieces], device)
        final = [end - 1 for end, (i, done, n) in zip(ends, pieces, strict=True) if done + n == lengths[i]]
        final_indices = torch.tensor(final, dtype=torch.int64, device=device)
        needed = None if scored else final_indices
        hidden = forward.hidden_states(tokens[first : first + ends[-1]], batch, logits_indices=needed)
        if scored:
            logprobs += score_tokens(forward.logits, hidden, tokens[first + 1 :])
            hidden = hidden[final_indices]
        last_hidden.append(hidden)
        first += ends[-1]
    starts = itertools.accumulate(lengths, initial=0)
    by_prompt = [[0.0, *logprobs[i + 1 : i + n]] if scored else [] for i, n in zip(starts, lengths, strict=False)]
    return torch.cat(last_hidden), by_prompt


def score_tokens(logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, following: torch.Tensor) -> list[float]:
    """Return the log probability of each token `following[i]`, given the hidden state `hidden[i]`. hidden: (N, dim)."""
    logprobs: list[float] = []
    for i in range(0, len(hidden), tuning.LOGPROB_CHUNK):
        chunk = logits(hidden[i : i + tuning.LOGPROB_CHUNK])
        logprobs += token_logprobs(chunk, following[i : i + len(chunk)]).tolist()
    return logprobs
