"""The choice of the next id. Nothing here waits for the device."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import InputError, describe

_LIMITS = {
    "temperature": (0.0, 1e30, "from 0 (the likeliest id) to 1e30"),
    "top_p": (0.0, 1.0, "from 0 to 1"),
    "min_p": (0.0, 1.0, "from 0 (off) to 1"),
    "repetition_penalty": (0.01, 100.0, "from 0.01 to 100; 1 is off"),
}


@dataclass(frozen=True)
class SamplingParams:
    """How the next id is chosen, in this order. Raises InputError when it is made with a value out of range.

    repetition_penalty: logits of ids that the row holds already, prompt or answer, are divided by it if positive, else
    multiplied. temperature: divides the logits; at 0 the likeliest id is taken, and nothing below matters. top_k: the k
    likeliest ids; 0 is all. top_p: of these, renormalised, each before which at most p is gathered. min_p: of these, each
    with at least min_p times the likeliest one's probability. One of what is left is drawn.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, (least, most, limit) in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not least <= value <= most:  # type: ignore[operator]
                raise InputError(f"{name} is {describe(value)}; it must be a number, {limit}")
            object.__setattr__(self, name, float(value))  # NumPy's are welcome
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral) or int(self.top_k) < 0:
            raise InputError(f"top_k is {describe(self.top_k)}; it must be a whole number, 0 (all ids) or more")
        object.__setattr__(self, "top_k", int(self.top_k))

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-20  # 0, or so near that dividing by it would overflow


def filter_probs(probs: torch.Tensor, top_p: float, top_k: int = 0, min_p: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """probs (B, vocab) -> what may be drawn, likeliest first, the rest 0, and the ids: (B, vocab) both, or (B, top_k)."""
    probs, ids = torch.sort(probs, dim=-1, descending=True)
    if top_k:
        probs, ids = probs[:, :top_k], ids[:, :top_k]
        probs = probs / probs.sum(dim=-1, keepdim=True)
    before = torch.cumsum(probs, dim=-1) - probs
    probs = probs.masked_fill((before > top_p) | (probs < min_p * probs[:, :1]), 0.0)
    return probs / probs.sum(dim=-1, keepdim=True), ids


def sample_exponential(probs: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """One of the candidates of each row, (B, 1)."""
    noise = torch.empty_like(probs).exponential_(1) if noise is None else noise.gather(-1, ids)
    return ids.gather(-1, (probs / noise).argmax(dim=-1, keepdim=True))


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Draw one id for each row of probs (B, vocab) from its nucleus; returns (B, 1) int64.

    The nucleus is every id, from the likeliest on, before which less than or exactly p is gathered; so the likeliest is
    always in it. Draws from torch's default generator exactly as torch.multinomial(probs, 1) does, which would wait.
    """
    return sample_exponential(*filter_probs(probs, p))


def sample(
    logits: torch.Tensor,
    sampling: SamplingParams,
    noise: torch.Tensor | None = None,
    sampler: Callable[[torch.Tensor, float], torch.Tensor] = sample_top_p,
) -> torch.Tensor:
    """logits (B, vocab), already penalized -> ids (B,).

    The draw divides by exponential noise and takes the largest: by `noise` (B, vocab) of the ids, or, without it, by what
    torch's default generator gives, as `sample_top_p`. Another sampler than that chooses by itself, of probabilities that
    top_k and min_p have narrowed.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampler is not sample_top_p:
        if sampling.top_k or sampling.min_p:
            narrowed, ids = filter_probs(probs, 1.0, sampling.top_k, sampling.min_p)
            probs = torch.zeros_like(probs).scatter_(-1, ids, narrowed)
        return sampler(probs, sampling.top_p).reshape(len(probs))
    return sample_exponential(*filter_probs(probs, sampling.top_p, sampling.top_k, sampling.min_p), noise).squeeze(-1)


def apply_repetition_penalty(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """logits (B, vocab) with those of the ids in `seen` (B, vocab), bool, made less likely by a penalty above 1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


_GOLDEN, _MIX1, _MIX2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's mixing of 64 bits, which wraps as unsigned numbers do."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def seeded_exponential(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Exponential noise (B, vocab), float32, of seeds and positions (B,) int64, made where they are.

    A number of its own for each seed, position and id, which no other row, call, rank or device can change. So what is
    drawn changes only where the two largest quotients nearly tie; a single number walked along summed probabilities
    would meet every rounding on its way.
    """
    ids = torch.arange(vocab, device=seeds.device)
    bits = _mix(_mix(_mix(seeds) + positions).unsqueeze(-1) + ids * _GOLDEN)
    uniform = ((bits >> 33 & (1 << 31) - 1).float() + 0.5) * 2.0**-31
    return -torch.log1p(-uniform)  # finest near 0, where what is drawn lies


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log_softmax of the raw logits (N, vocab) at ids (N,) -> (N,)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
