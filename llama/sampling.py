"""Sampling: the options of a call, which are checked here, and the choice of the next token from logits.

No function in this module makes the host wait for the device.
"""

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .errors import InputError, describe, is_integer

Sampler = Callable[[torch.Tensor, float], torch.Tensor]  # the signature of sample_top_p: (probabilities, top_p) -> tokens

_LIMITS = {
    "temperature": (0.0, 1e30, "from 0 (the likeliest token) to 1e30"),
    "top_p": (0.0, 1.0, "from 0 to 1"),
    "min_p": (0.0, 1.0, "from 0 (off) to 1"),
    "typical_p": (0.0, 1.0, "from 0 to 1 (off)"),
    "repetition_penalty": (0.01, 100.0, "from 0.01 to 100; 1 is off"),
    "frequency_penalty": (-2.0, 2.0, "from -2 to 2; 0 is off"),
    "presence_penalty": (-2.0, 2.0, "from -2 to 2; 0 is off"),
}
MAX_BIAS = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of sampling, applied in the order below; None means the default. Raises InputError for a wrong value.

    logit_bias: a mapping from tokens to numbers from -100 to 100, which are added to the logits.
    repetition_penalty: for tokens already in the prompt or the answer, divides positive logits and multiplies negative logits.
    frequency_penalty, presence_penalty: subtracted from the logits of tokens already in the answer; the first as often as a
    token occurs there, the second once.
    temperature: divides the logits. At 0 the token with the largest logit is chosen, and the parameters below have no effect.
    top_k: keeps the k likeliest tokens, and renormalizes their probabilities; 0 keeps all.
    top_p: keeps each token if the more likely tokens together have at most probability top_p.
    min_p: keeps each token with at least min_p times the probability of the likeliest token.
    typical_p: keeps the most typical tokens, as many as have together at least probability typical_p; 1 keeps all. The closer
    -log(probability) of a token is to its mean, the entropy, the more typical it is. See `keep_typical`.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # a dict of our own, sorted by tokens
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    typical_p: float = 1.0

    def __init__(
        self,
        temperature: float | None = temperature,
        top_p: float | None = top_p,
        top_k: int | None = top_k,
        min_p: float | None = min_p,
        repetition_penalty: float | None = repetition_penalty,
        logit_bias: Mapping[int, float] | None = None,
        frequency_penalty: float | None = frequency_penalty,
        presence_penalty: float | None = presence_penalty,
        typical_p: float | None = typical_p,
    ) -> None:
        given = dict(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty, presence_penalty=presence_penalty, typical_p=typical_p,
        )  # fmt: skip
        for name, option in given.items():
            object.__setattr__(self, name, getattr(type(self), name) if option is None else option)
        for name, (low, high, limit) in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:  # type: ignore[operator]
                raise InputError(f"{name} is {describe(value)}; it must be a number, {limit}")
            object.__setattr__(self, name, float(value))  # convert NumPy's numbers to float
        if not is_integer(self.top_k) or int(self.top_k) < 0:
            raise InputError(f"top_k is {describe(self.top_k)}; it must be a whole number, 0 (all tokens) or more")
        object.__setattr__(self, "top_k", int(self.top_k))
        object.__setattr__(self, "logit_bias", _checked_bias({} if logit_bias is None else logit_bias))

    @property
    def greedy(self) -> bool:
        """Return True if the likeliest token is chosen without sampling."""
        return self.temperature < 1e-20  # treat tiny temperatures as 0, because dividing by them would overflow


def _checked_bias(logit_bias: Mapping[int, float]) -> dict[int, float]:
    """Return a copy of a logit bias, sorted by tokens. Raise InputError for a wrong one."""
    if not isinstance(logit_bias, Mapping):
        raise InputError(f"logit_bias is {describe(logit_bias)}; it must map tokens to numbers, as in {{token: -100}}")
    checked = dict[int, float]()
    for token, bias in logit_bias.items():
        if not is_integer(token) or int(token) < 0:
            raise InputError(f"logit_bias: {describe(token)} is no token; tokens are whole numbers, 0 or more")
        if isinstance(bias, bool) or not isinstance(bias, numbers.Real) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InputError(f"logit_bias of token {token} is {describe(bias)}; it must be a number, from -100 to 100")
        checked[int(token)] = float(bias)
    return dict(sorted(checked.items()))


def check_bias_tokens(logit_bias: Mapping[int, float], n_words: int) -> None:
    """Raise InputError if a logit bias is for a token that a tokenizer of n_words tokens does not have."""
    if (largest := max(logit_bias, default=0)) >= n_words:
        raise InputError(f"logit_bias: {largest} is no token; tokens are whole numbers from 0 to {n_words - 1}")


def bias_of_tokens(logit_bias: Mapping[int, float], vocab: int) -> torch.Tensor:
    """Return what a logit bias adds to each logit, (vocab,) float32, on the CPU."""
    bias = torch.zeros(vocab, dtype=torch.float32, device="cpu")
    bias[torch.tensor([*logit_bias], dtype=torch.int64, device="cpu")] = torch.tensor([*logit_bias.values()], device="cpu")
    return bias


def filter_probs(
    probs: torch.Tensor, top_p: float, top_k: int = 0, min_p: float = 0.0, typical_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the options to probs (B, vocab), in their order: return the new probabilities, likeliest first, and their tokens.

    Probabilities and tokens are (B, vocab), or (B, top_k) if top_k is not 0. The probability of a removed token is 0. The
    probabilities of each row sum to 1.
    """
    probs, tokens = torch.sort(probs, dim=-1, descending=True)
    if top_k:
        probs, tokens = probs[:, :top_k], tokens[:, :top_k]
        probs = probs / probs.sum(dim=-1, keepdim=True)
    more_likely = torch.cumsum(probs, dim=-1) - probs
    probs = probs.masked_fill((more_likely > top_p) | (probs < min_p * probs[:, :1]), 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return (keep_typical(probs, typical_p) if typical_p < 1 else probs), tokens


def keep_typical(probs: torch.Tensor, typical_p: float) -> torch.Tensor:
    """Keep the most typical tokens of probs (B, n): return the new probabilities in the same order, 0 for a removed token.

    Tokens are kept in the order of the distance of -log(probability) from the entropy, until they have together at least
    probability typical_p; those that are as far as the last one are kept, too. See "Locally Typical Sampling", Meister et al.
    """
    entropy = torch.special.entr(probs).sum(dim=-1, keepdim=True)
    distance = (-probs.log() - entropy).abs()  # inf for tokens of probability 0
    nearest, order = distance.sort(dim=-1)
    mass = probs.gather(-1, order).cumsum(dim=-1)
    last = (mass < typical_p).sum(dim=-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    probs = probs.masked_fill(distance > nearest.gather(-1, last), 0.0)
    return probs / probs.sum(dim=-1, keepdim=True)


def sample_exponential(probs: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Sample one token per row: the token with the largest probability / noise. Return the tokens (B, 1).

    probs, tokens: (B, n), probabilities and their tokens. noise: exponential noise for each token, (B, vocab); by default from
    torch's default generator.
    """
    noise = torch.empty_like(probs).exponential_(1) if noise is None else noise.gather(-1, tokens)
    return tokens.gather(-1, (probs / noise).argmax(dim=-1, keepdim=True))


def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
    """Sample one token per row of probs (B, vocab) from the row's nucleus: (B, 1) int64.

    The nucleus contains each token if the more likely tokens together have at most probability p, so it always contains the
    likeliest token. The function returns the same tokens as torch.multinomial(probs, 1) on the nucleus, and uses torch's
    default generator in the same way. Unlike torch.multinomial, it does not wait for the device.
    """
    return sample_exponential(*filter_probs(probs, p))


def sample(
    logits: torch.Tensor,
    sampling: SamplingParams,
    noise: torch.Tensor | None = None,
    sampler: Sampler = sample_top_p,
) -> torch.Tensor:
    """Sample one token per row: logits (B, vocab) -> tokens (B,). Biases and penalties must have been applied before.

    noise: exponential noise (B, vocab); by default from torch's default generator, as in `sample_top_p`.
    sampler: a caller's replacement for `sample_top_p`. Its arguments are top_p, and the probabilities after the other options.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    others = sampling.top_k, sampling.min_p, sampling.typical_p
    if sampler is not sample_top_p:
        if others != (0, 0, 1):
            filtered, tokens = filter_probs(probs, 1.0, *others)
            probs = torch.zeros_like(probs).scatter_(-1, tokens, filtered)
        return sampler(probs, sampling.top_p).reshape(len(probs))
    return sample_exponential(*filter_probs(probs, sampling.top_p, *others), noise).squeeze(-1)


def apply_repetition_penalty(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits (B, vocab) after a repetition penalty. A penalty above 1 makes the seen tokens less likely.

    seen: (B, vocab), True for each token to penalize.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_count_penalties(logits: torch.Tensor, counts: torch.Tensor, frequency: float, presence: float) -> torch.Tensor:
    """Return logits (B, vocab) after a frequency and a presence penalty, in OpenAI's meaning.

    counts: (B, vocab) float32, how often each token is in the answer so far.
    """
    return logits - frequency * counts - presence * (counts > 0)


_GOLDEN, _MIX1, _MIX2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Return the SplitMix64 hash of int64 values. int64 products wrap around like the unsigned products of SplitMix64."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def seeded_exponential(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return exponential noise (B, vocab), float32, for seeds (B,) and positions (B,), both int64 and on the same device.

    Each value depends only on its seed, position and token, not on other rows, calls, ranks or the device. `sample_exponential`
    chooses the largest quotient of probability and noise, so a rounding error in the logits changes a token only if the two
    largest quotients are almost equal. Comparing cumulative probabilities with one random number per row would be more
    sensitive, because they add up the rounding errors of many tokens.
    """
    tokens = torch.arange(vocab, device=seeds.device)
    bits = _mix(_mix(_mix(seeds) + positions).unsqueeze(-1) + tokens * _GOLDEN)
    uniform = ((bits >> 33 & (1 << 31) - 1).float() + 0.5) * 2.0**-31
    return -torch.log1p(-uniform)  # log1p is most precise near 0, and noise of sampled tokens is usually near 0


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log probabilities (N,) of tokens (N,) under logits (N, vocab), without any sampling parameter."""
    return ranked_logprobs(logits, tokens, 0)[0]


def ranked_logprobs(logits: torch.Tensor, tokens: torch.Tensor, n_top: int) -> list[torch.Tensor]:
    """Return `token_logprobs`, and unless n_top is 0, the n_top largest log probabilities (N, n_top) and their tokens."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return [chosen, *logprobs.topk(min(n_top, logits.shape[-1]))] if n_top else [chosen]
