"""Top-p against its definition, and against torch.multinomial's draws."""

import pytest
import torch

from llama.sampling import Sampling, logprobs_of, next_ids, sample_top_p


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
    assert next_ids(logits, Sampling(0)).tolist() == [1]
    torch.manual_seed(0)
    cold, hot = (torch.cat([next_ids(logits, Sampling(t, 1.0)) for _ in range(300)]).unique() for t in (0.05, 5.0))
    assert cold.tolist() == [1] and hot.tolist() == [0, 1, 2]


def test_logprobs() -> None:
    logits, ids = torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
    expected = [logits[i].double().softmax(-1)[ids[i]].log().item() for i in range(4)]
    assert logprobs_of(logits, ids).tolist() == pytest.approx(expected, abs=1e-5)
