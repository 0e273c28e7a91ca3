"""Test sampling from logits: compare top-p, top-k, min-p, repetition penalty and seeds with their definitions, and with
torch.multinomial."""

import math

import pytest
import torch

from llama.sampling import (
    SamplingParams,
    apply_count_penalties,
    apply_repetition_penalty,
    filter_probs,
    sample,
    sample_top_p,
    seeded_exponential,
    token_logprobs,
)


def nucleus(probs: list[float], p: float) -> set[int]:
    """Return the tokens that top-p keeps. In order of falling probability, a token is kept if the probabilities before it sum
    to at most p."""
    kept, total = set(), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if total <= p:
            kept.add(i)
        total += probs[i]
    return kept


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_sample_top_p_samples_only_the_nucleus_and_in_proportion(p: float) -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.125, 0.5, 0.25, 0.0625, 0.0625])
    sampled = sample_top_p(probs.repeat(20000, 1), p)
    assert sampled.shape == (20000, 1) and sampled.dtype == torch.int64
    kept = nucleus(probs.tolist(), p)
    assert set(sampled.unique().tolist()) == kept
    for i in kept:
        share = probs[i].item() / sum(probs[j].item() for j in kept)
        assert (sampled == i).float().mean().item() == pytest.approx(share, abs=0.02)


def test_sample_top_p_samples_as_torch_multinomial_does_from_the_same_generator_state() -> None:
    probs = torch.softmax(torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)), -1)
    torch.manual_seed(5)
    got, after = sample_top_p(probs, 1.0).squeeze(-1), torch.rand(1)
    torch.manual_seed(5)
    sorted_probs, tokens = probs.sort(-1, descending=True)
    want = tokens.gather(-1, torch.multinomial(sorted_probs / sorted_probs.sum(-1, keepdim=True), 1)).squeeze(-1)
    assert torch.equal(got, want) and torch.equal(after, torch.rand(1))


def test_a_low_temperature_samples_the_likeliest_token_and_a_high_one_all_tokens() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, SamplingParams(0)).tolist() == [1]
    torch.manual_seed(0)
    cold, hot = (torch.cat([sample(logits, SamplingParams(t, 1.0)) for _ in range(300)]).unique() for t in (0.05, 5.0))
    assert cold.tolist() == [1] and hot.tolist() == [0, 1, 2]


def test_token_logprobs_are_the_log_softmax_at_each_token() -> None:
    logits, tokens = torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
    expected = [logits[i].double().softmax(-1)[tokens[i]].log().item() for i in range(4)]
    assert token_logprobs(logits, tokens).tolist() == pytest.approx(expected, abs=1e-5)


def distribution(logits: list[float], seen: set[int], s: SamplingParams) -> dict[int, float]:
    """Return the probability of each token that may be sampled, computed from the definitions of the sampling options."""
    logits = [
        (x / s.repetition_penalty if x > 0 else x * s.repetition_penalty) if i in seen else x for i, x in enumerate(logits)
    ]
    weights = {i: math.exp(x / s.temperature) for i, x in enumerate(logits)}

    def normalize(weights: dict[int, float]) -> dict[int, float]:
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    ranked = sorted(weights, key=lambda i: -weights[i])
    probs = normalize({i: weights[i] for i in ranked[: s.top_k or None]})
    order = list(probs)
    probs = normalize({order[n]: probs[order[n]] for n in nucleus([probs[i] for i in order], s.top_p)})
    probs = normalize({i: p for i, p in probs.items() if p >= s.min_p * max(probs.values())})
    return normalize({i: probs[i] for i in typical(probs, s.typical_p)})


def typical(probs: dict[int, float], mass: float) -> set[int]:
    """Return the most typical tokens that have at least this mass: -log p is closest to the entropy."""
    entropy = sum(-p * math.log(p) for p in probs.values())
    order = sorted(probs, key=lambda i: abs(-math.log(probs[i]) - entropy))
    n = next((n for n in range(1, len(order)) if sum(probs[i] for i in order[:n]) >= mass), len(order))
    return set(order if mass == 1 else order[:n])


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 4},
        {"top_k": 1},
        {"top_k": 10**30},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"top_p": 0.6, "top_k": 5},
        {"typical_p": 0.5},
        {"typical_p": 0.0},
        {"typical_p": 0.99, "top_k": 6},
        {"temperature": 1.7, "typical_p": 0.6, "min_p": 0.05, "top_p": 0.95},
        {"temperature": 2.0, "top_p": 0.8, "top_k": 9, "min_p": 0.2, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampling_options_give_the_distribution_of_their_definitions(options: dict, seeded: bool) -> None:
    """Sample 20,000 tokens. Only tokens that the options allow may occur, and the frequency of each must be close to its
    probability."""
    n, seen = 20000, {2, 5, 7}
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 1.5
    sampling = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **options})
    mask = torch.tensor([i in seen for i in range(12)])
    penalized = apply_repetition_penalty(logits.unsqueeze(0), mask.unsqueeze(0), sampling.repetition_penalty).expand(n, -1)
    torch.manual_seed(0)
    exponential = seeded_exponential(torch.arange(n), torch.full((n,), 9), 12) if seeded else None
    frequencies = sample(penalized, sampling, exponential).bincount(minlength=12) / n
    want = distribution(logits.tolist(), seen, sampling)
    assert {i for i, p in want.items() if p > 1e-3} <= {i for i in range(12) if frequencies[i]} <= set(want)
    for i, p in want.items():
        assert frequencies[i].item() == pytest.approx(p, abs=0.015)


def python_exponential(seed: int, position: int, token: int) -> float:
    """Compute one value of `seeded_exponential` with Python integers and the mixing function of SplitMix64."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    bits = mix((mix((mix(seed % 2**64) + position) % 2**64) + token * 0x9E3779B97F4A7C15) % 2**64)
    return -math.log1p(-((bits >> 33) + 0.5) / 2**31)


def test_seeded_exponential_values_are_computed_by_splitmix64_on_every_machine() -> None:
    seeds, positions = [0, 1, -1, 2**63 - 1, -(2**63)], [0, 7, 7, 4095, 1]
    values = seeded_exponential(torch.tensor(seeds), torch.tensor(positions), 300)
    for row, seed, position in zip(values.tolist(), seeds, positions, strict=True):
        assert row == pytest.approx([python_exponential(seed, position, i) for i in range(300)], rel=1e-5)


def test_seeded_exponential_values_are_exponentially_distributed_and_uncorrelated() -> None:
    """Check that the values for consecutive seeds, positions and tokens are distributed exponentially and are not
    correlated."""
    values = seeded_exponential(torch.arange(50).repeat_interleave(40), torch.arange(40).repeat(50), 200).view(50, 40, 200)
    for below in (1e-3, 0.1, 0.7, 2.0):
        assert (values < below).double().mean().item() == pytest.approx(1 - math.exp(-below), rel=0.06)
    uniform = (1 - torch.exp(-values) - 0.5).double()
    for a, b in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1]), (uniform[..., 1:], uniform[..., :-1])):
        # The correlation of independent values would have a standard deviation of 0.0016.
        assert abs((a * b).mean().item()) * 12 < 0.01
    assert len(values.flatten().unique()) > 0.99 * values.numel()


def test_top_p_applies_after_top_k_and_min_p_1_keeps_the_likeliest_token() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert filter_probs(probs, 1.0, min_p=1.0)[0].tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert filter_probs(probs, 0.55, top_k=2)[0].tolist() == [[1.0, 0.0]]  # top_p applies to the top_k tokens alone
    assert SamplingParams(repetition_penalty=0.01).repetition_penalty == 0.01


def test_the_penalties_are_openais() -> None:
    """OpenAI: mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence."""
    logits, counts = torch.randn(2, 5), torch.tensor([[0.0, 1, 2, 0, 5], [0, 0, 0, 0, 0]])
    for frequency, presence in ((1.5, 0.0), (0.0, 2.0), (-0.5, 0.25)):
        want = [
            [mu - c * frequency - float(c > 0) * presence for mu, c in zip(*row, strict=True)]
            for row in zip(logits.tolist(), counts.tolist(), strict=True)
        ]
        got = apply_count_penalties(logits, counts, frequency, presence)
        assert got.tolist() == [pytest.approx(row, abs=1e-6) for row in want]


def test_typical_p_keeps_tokens_that_are_equally_typical_and_at_least_one() -> None:
    probs = torch.full((1, 4), 0.25)
    assert filter_probs(probs, 1.0, typical_p=0.1)[0].tolist() == probs.tolist()
    one = torch.tensor([[0.0, 1.0, 0.0]])
    assert filter_probs(one, 1.0, typical_p=0.5)[0].tolist() == [[1.0, 0.0, 0.0]]
