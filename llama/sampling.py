"""The choice of the next id. Nothing here waits for the device."""

import torch


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Draw one id for each row of probs (B, vocab) from its nucleus; returns (B, 1) int64.

    The nucleus is every id, from the likeliest on, before which less than or exactly p is gathered; so the likeliest is
    always in it. Draws from torch's default generator exactly as torch.multinomial(probs, 1) does, which would wait.
    """
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs
    nucleus = sorted_probs.masked_fill(before > p, 0.0)
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    drawn = (nucleus / torch.empty_like(nucleus).exponential_(1)).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, drawn)


def next_ids(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """logits (B, vocab) -> ids (B,): the likeliest at temperature 0, else drawn by top-p."""
    if temperature < 1e-20:  # 0, or so near that dividing by it would overflow
        return logits.argmax(dim=-1)
    return sample_top_p(torch.softmax(logits / temperature, dim=-1), top_p).squeeze(-1)


def logprobs_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log_softmax of the raw logits (N, vocab) at ids (N,) -> (N,)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
