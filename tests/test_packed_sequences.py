"""Scoring sequences side by side: tokens with which they begin alike are computed once, and no score depends on it."""

import random
from pathlib import Path

import pytest
import torch

from llama import Llama, Score, Transformer, tuning
from llama.engine.forward import EngineForward
from llama.engine.packed_sequences import divide_sequences, pack_sequences

from .counting import count_forward_tokens
from .support import random_weights, write_shards
from .test_batches import exact

# Answers to three questions. Some have one token, some are the beginning of another, and two are equal.
QUESTIONS = [[1, *range(20, 50)], [1, *range(20, 45), *range(60, 70)], [1, 300, 301, 302]]
ANSWERS = [[[7], [8], [7, 9], [7, 9, 11, 13], [70, 71, 72]], [[7, 9, 11], [7, 9, 11], [10]], [[5, 6], [5]]]


def random_sequences(seed: int) -> list[list[int]]:
    """Return sequences of 1 to 40 tokens, many of which begin with the same 1 to 40 tokens."""
    rng = random.Random(seed)
    heads = [rng.choices(range(5), k=rng.randint(1, 20)) for _ in range(4)]
    return [[*rng.choice(heads), *rng.choices(range(5), k=rng.randint(0, 20))] for _ in range(30)]


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_each_sequence_finds_all_its_tokens_at_their_positions(
    seed: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments cover the computed tokens in order, and every token attends to the tokens of its own sequence before it."""
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 60)  # also divides segments with many keys
    sequences = random_sequences(seed)
    tokens, indices, batch = pack_sequences(sorted(sequences), multiple)
    assert [[tokens[i] for i in places] for places in indices] == sorted(sequences)
    assert all(batch.positions[places].tolist() == list(range(len(places))) for places in indices)
    assert sorted({i for places in indices for i in places}) == list(range(len(tokens)))
    first = 0
    for segment in batch.segments:
        for row in range(segment.n_rows):
            computed = list(range(first, first := first + segment.length))
            keys = computed if segment.kv_indices is None else segment.kv_indices[row].tolist()
            assert keys in indices and keys[-segment.length :] == computed and len(keys) == segment.kv_len
            assert (segment.kv_len - segment.length) % multiple == 0
    assert first == len(tokens) < sum(map(len, sequences))


def test_batches_have_a_limit_of_computed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 60)
    sequences = [*random_sequences(0), [3] * 100, [3] * 100]
    batches = divide_sequences(sequences, 1)
    assert sorted(i for batch in batches for i in batch) == list(range(32))
    for batch in batches:
        rows = [sequences[i] for i in batch]
        assert rows == sorted(rows)
        assert len(pack_sequences(rows, 1).tokens) <= 60 or rows == [[3] * 100] * 2  # equal sequences cost nothing
    assert divide_sequences([], 1) == []


@pytest.mark.parametrize("chunk", [16, 2048])
def test_answers_to_a_question_share_its_tokens_and_score_as_alone(
    any_way: Llama, reference: Transformer, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", chunk)
    scores = any_way.score(QUESTIONS, ANSWERS)
    for question, answers, results in zip(QUESTIONS, ANSWERS, scores, strict=True):
        for answer, result in zip(answers, results, strict=True):  # type: ignore[arg-type]
            table = reference.forward(torch.tensor([[*question, *answer][:-1]]), 0)[0].log_softmax(-1)[-len(answer) :]
            want = table.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1).tolist()
            assert isinstance(result, Score) and result.logprobs == pytest.approx(want, abs=1e-4)
            assert result.greedy == (table.argmax(-1) == torch.tensor(answer)).tolist()
    assert any_way.score(QUESTIONS, ANSWERS) == scores


def test_answers_of_one_token_compute_their_question_once(llama: Llama) -> None:
    with count_forward_tokens() as counts:
        llama.score([QUESTIONS[0]], [[[7], [8], [9], [10]]])
    assert counts == [len(QUESTIONS[0])]


def test_calls_that_score_few_sequences_share_long_prefixes_with_later_calls(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is so where results do not depend on the batch. Later calls with another question compute only that."""
    monkeypatch.setattr(EngineForward, "is_batch_invariant", True)
    monkeypatch.setattr(EngineForward, "prefix_multiple", lambda *_, **__: 1)
    monkeypatch.setattr(tuning, "MIN_KEPT_PREFIX", 20)
    llama.clear_prefix_cache()
    for i, least in ((0, 45), (1, 0)):
        with count_forward_tokens() as counts:
            llama.score([[1, *range(20, 65), 100 + i]], [[[7, 8], [9, 10, 11]]])
        assert least <= sum(counts) <= least + 10


@exact
@pytest.mark.parametrize("head_dim", [64, 32])
def test_scores_are_bitwise_those_of_each_sequence_alone(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    params = dict(
        dim=256, n_layers=2, n_heads=256 // head_dim, n_kv_heads=2, multiple_of=32, norm_eps=1e-5, vocab_size=-1
    )  # fmt: skip
    folder = write_shards(tmp_path, params, random_weights(params, 384, 704))
    llama = Llama.build(folder, tokenizer_path, 512, 4, device="cpu", dtype="bfloat16")
    rng = random.Random(0)
    prompts = [[1, *rng.choices(range(5, 300), k=n)] for n in (1, 6, 40, 129, 200)]
    answers = [[rng.choices(range(5, 300), k=n) for n in (1, 1, 2, 2, 3, 9, 130)] for _ in prompts]
    alone = [[llama.score([p], [each])[0] for each in choices] for p, choices in zip(prompts, answers, strict=True)]
    assert llama.score(prompts, answers) == alone
