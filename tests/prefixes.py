"""Fixtures and helpers for the tests of the prefix cache: prompts that share tokens, and answers without the cache."""

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from llama import Llama, tuning

GREEDY = {"temperature": 0, "logprobs": True}


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share prefixes in steps of 4 tokens, so that short prompts test it."""
    for name in ("ATTENTION_CHUNK", "MIN_SHARED_PREFIX", "MIN_CACHED_PREFIX", "MIN_AWAITED_PREFIX", "MIN_SAVED_PREFIX"):
        monkeypatch.setattr(tuning, name, 4)


@pytest.fixture
def own(small: SimpleNamespace, fine: None) -> Llama:
    """Build a model of the test's own, with an empty KV cache."""
    return Llama.build(small.folder, small.tokenizer_path, max_seq_len=64, max_batch_size=6, device="cpu")


def prompt(*parts: tuple[int, int]) -> list[int]:
    """Return BOS and random tokens. Each part is (seed, number of tokens); equal parts have equal tokens."""
    return [1, *itertools.chain(*(random.Random(seed).choices(range(5, 300), k=n) for seed, n in parts))]


def without_cache(llama: Llama, *args: Any, **options: Any) -> Any:
    """Return what `generate` returns if no row of the cache holds tokens and no prompt waits for another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MIN_AWAITED_PREFIX", 10**9)
        llama.engine.forward().cache.prefixes.clear()
        return llama.generate(*args, **options)


def assert_close(got: Any, want: Any) -> None:
    assert got[0] == want[0]
    for values, expected in zip(got[1], want[1], strict=True):
        assert values == pytest.approx(expected, abs=1e-4)
