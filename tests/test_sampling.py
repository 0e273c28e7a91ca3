"""Top-p against its definition, and against torch.multinomial's draws."""

import math

import pytest
import torch

from llama.sampling import (
    SamplingParams,
    apply_repetition_penalty,
    filter_probs,
    sample,
    sample_top_p,
    seeded_exponential,
    token_logprobs,
)


def nucleus(probs: list[float], p: float) -> set[int]:
    """The definition: from the likeliest on, every id before which at most p is gathered."""
    kept, gathered = set(), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if gathered <= p:
            kept.add(i)
        gathered += probs[i]
    return kept


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_draws_come_from_the_nucleus_in_proportion(p: float) -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.125, 0.5, 0.25, 0.0625, 0.0625])
    drawn = sample_top_p(probs.repeat(20000, 1), p)
    assert drawn.shape == (20000, 1) and drawn.dtype == torch.int64
    kept = nucleus(probs.tolist(), p)
    assert set(drawn.unique().tolist()) == kept
    for i in kept:
        share = probs[i].item() / sum(probs[j].item() for j in kept)
        assert (drawn == i).float().mean().item() == pytest.approx(share, abs=0.02)


def test_same_generator_state_same_draws_as_multinomial() -> None:
    probs = torch.softmax(torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)), -1)
    torch.manual_seed(5)
    ours, after = sample_top_p(probs, 1.0).squeeze(-1), torch.rand(1)
    torch.manual_seed(5)
    sorted_probs, ids = probs.sort(-1, descending=True)
    theirs = ids.gather(-1, torch.multinomial(sorted_probs / sorted_probs.sum(-1, keepdim=True), 1)).squeeze(-1)
    assert torch.equal(ours, theirs) and torch.equal(after, torch.rand(1))


def test_temperature() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sample(logits, SamplingParams(0)).tolist() == [1]
    torch.manual_seed(0)
    cold, hot = (torch.cat([sample(logits, SamplingParams(t, 1.0)) for _ in range(300)]).unique() for t in (0.05, 5.0))
    assert cold.tolist() == [1] and hot.tolist() == [0, 1, 2]


def test_logprobs() -> None:
    logits, ids = torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
    expected = [logits[i].double().softmax(-1)[ids[i]].log().item() for i in range(4)]
    assert token_logprobs(logits, ids).tolist() == pytest.approx(expected, abs=1e-5)


def distribution(logits: list[float], seen: set[int], s: SamplingParams) -> dict[int, float]:
    """The definitions, read plainly: what each id may be drawn with."""
    logits = [
        (x / s.repetition_penalty if x > 0 else x * s.repetition_penalty) if i in seen else x for i, x in enumerate(logits)
    ]
    weights = {i: math.exp(x / s.temperature) for i, x in enumerate(logits)}

    def normal(weights: dict[int, float]) -> dict[int, float]:
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    ranked = sorted(weights, key=lambda i: -weights[i])
    probs = normal({i: weights[i] for i in ranked[: s.top_k or None]})
    order = list(probs)
    probs = normal({order[n]: probs[order[n]] for n in nucleus([probs[i] for i in order], s.top_p)})
    return normal({i: p for i, p in probs.items() if p >= s.min_p * max(probs.values())})


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
        {"temperature": 2.0, "top_p": 0.8, "top_k": 9, "min_p": 0.2, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_options_draw_as_their_definitions_say(options: dict, seeded: bool) -> None:
    """20,000 draws from one distribution: only what may be drawn, each in proportion."""
    n, seen = 20000, {2, 5, 7}
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 1.5
    sampling = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **options})
    mask = torch.tensor([i in seen for i in range(12)])
    penalized = apply_repetition_penalty(logits.unsqueeze(0), mask.unsqueeze(0), sampling.repetition_penalty).expand(n, -1)
    torch.manual_seed(0)
    noise = seeded_exponential(torch.arange(n), torch.full((n,), 9), 12) if seeded else None
    drawn = sample(penalized, sampling, noise).bincount(minlength=12) / n
    want = distribution(logits.tolist(), seen, sampling)
    assert {i for i, p in want.items() if p > 1e-3} <= {i for i in range(12) if drawn[i]} <= set(want)
    for i, p in want.items():
        assert drawn[i].item() == pytest.approx(p, abs=0.015)


def plain_noise(seed: int, position: int, id_: int) -> float:
    """SplitMix64's mixing with Python's numbers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    bits = mix((mix((mix(seed % 2**64) + position) % 2**64) + id_ * 0x9E3779B97F4A7C15) % 2**64)
    return -math.log1p(-((bits >> 33) + 0.5) / 2**31)


def test_seeded_noise_is_the_same_everywhere() -> None:
    seeds, positions = [0, 1, -1, 2**63 - 1, -(2**63)], [0, 7, 7, 4095, 1]
    noise = seeded_exponential(torch.tensor(seeds), torch.tensor(positions), 300)
    for row, seed, position in zip(noise.tolist(), seeds, positions, strict=True):
        assert row == pytest.approx([plain_noise(seed, position, i) for i in range(300)], rel=1e-5)


def test_seeded_noise_is_exponential_and_unrelated_between_neighbours() -> None:
    """Of seeds, positions and ids that follow each other, as they will in use."""
    noise = seeded_exponential(torch.arange(50).repeat_interleave(40), torch.arange(40).repeat(50), 200).view(50, 40, 200)
    for below in (1e-3, 0.1, 0.7, 2.0):
        assert (noise < below).double().mean().item() == pytest.approx(1 - math.exp(-below), rel=0.06)
    uniform = (1 - torch.exp(-noise) - 0.5).double()
    for a, b in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1]), (uniform[..., 1:], uniform[..., :-1])):
        assert abs((a * b).mean().item()) * 12 < 0.01  # correlation; its deviation is 0.0016
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()


def test_the_edges_of_the_candidates() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert filter_probs(probs, 1.0, min_p=1.0)[0].tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert filter_probs(probs, 0.55, top_k=2)[0].tolist() == [[1.0, 0.0]]  # top_p is of what top_k leaves
    assert SamplingParams(repetition_penalty=0.01).repetition_penalty == 0.01
