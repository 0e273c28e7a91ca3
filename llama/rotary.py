"""Rotary embeddings: each head of queries and keys is turned, pair by pair, by angles that grow with its position."""

import torch

from .errors import InputError


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> torch.Tensor:
    """e^(i * angle) for positions 0..end, complex64 (end, dim / 2); the angle is position * theta^(-2j/dim)."""
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, device="cpu")[: dim // 2].float() / dim)
    angles = torch.outer(torch.arange(end, device="cpu").float(), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """freqs_cis (S, hd/2) -> (1, S, 1, hd/2), to go with x (B, S, heads, hd/2)."""
    if freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise InputError(
            f"freqs_cis is {tuple(freqs_cis.shape)}; for x {tuple(x.shape)} it must be {(x.shape[1], x.shape[-1])}"
        )
    return freqs_cis.view(1, x.shape[1], *[1] * (x.ndim - 3), x.shape[-1])


# Complex numbers that one thread multiplies. Of more PyTorch gives threads their shares, which may end inside a head, and the
# last few numbers of a share are rounded otherwise: a row's would then depend on how many others there are.
ALONE = 32767


def rotate_(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Turn adjacent pairs of x (..., heads, hd) in place, in float32, by freqs: cosines and sines, (..., 1, hd/2, 2)."""
    if x.device.type == "mps":
        return x.copy_(rotate_plainly(x, freqs))
    return turn_(x, torch.view_as_complex(freqs))


def turn_(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """`rotate_` by complex numbers, (..., 1, hd/2)."""
    y = x.float()  # x itself where it is float32
    pairs = torch.view_as_complex(y.view(*x.shape[:-1], -1, 2))
    n = max(1, ALONE // (x.shape[-2] * x.shape[-1] // 2))
    if len(x) <= n or x.ndim > 3 or torch.is_grad_enabled() or not x.is_cpu:
        pairs.mul_(freqs_cis)
    else:
        for part, turns in zip(pairs.split(n), freqs_cis.split(n), strict=True):
            part.mul_(turns)
    return x if y is x else x.copy_(y)


def rotate_plainly(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """`rotate_`, written out, and not in place."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def apply_rotary_emb(xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """xq, xk (B, S, heads, hd) turned by freqs_cis, complex (S, hd/2)."""
    freqs = torch.view_as_real(reshape_for_broadcast(freqs_cis, xq[..., ::2]))
    return rotate_(xq.clone(), freqs), rotate_(xk.clone(), freqs)
