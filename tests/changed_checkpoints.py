"""Fixtures and helpers for the tests of invalid checkpoints: copies to change, and a check of the error."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, Llama, LlamaError
from llama.checkpoint import loading

from .support import write_shards

FIRST, SECOND, TOKENIZER = "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"
EMBEDDING, NORM, W2 = "tok_embeddings.weight", "layers.1.ffn_norm.weight", "layers.1.feed_forward.w2.weight"
AssertBuildRaises = Callable[..., None]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, small: SimpleNamespace) -> Path:
    """Write the small model in two shards; return the folder."""
    return write_shards(tmp_path_factory.mktemp("halves"), small.params, small.weights, n_shards=2)


@pytest.fixture
def copy(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Return the folder of a copy of the small model and its tokenizer. The test may damage the copy."""
    folder = shutil.copytree(small.folder, tmp_path / "model")
    shutil.copy(small.tokenizer_path, folder / TOKENIZER)
    return folder


@pytest.fixture
def assert_build_raises(small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AssertBuildRaises:
    """Return a function that checks that `Llama.build` raises a CheckpointError whose message contains all the parts.

    Unless `reads` is true, the error must be raised before any weight is read.
    """

    def build(folder: Any, *parts: str, reads: bool = False, **arguments: Any) -> None:
        if not reads:
            monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
        beside = tmp_path / "model" / TOKENIZER
        arguments = {"tokenizer_path": beside if os.path.lexists(beside) else small.tokenizer_path} | arguments
        with pytest.raises(CheckpointError) as caught:
            Llama.build(folder, max_seq_len=16, max_batch_size=2, device="cpu", **arguments)
        assert isinstance(caught.value, LlamaError) and isinstance(caught.value, AssertionError)
        message = str(caught.value)
        assert [part for part in parts if part not in message] == [] and len(message) < 700, message

    return build


def change_tensors(path: Path, change: Callable[[dict], Any]) -> None:
    """Load a shard, change its tensors, and save it. `change` returns a new dict of tensors or modifies the dict in place."""
    tensors = torch.load(path)
    changed = change(tensors)
    torch.save(tensors if changed is None else changed, path)


ONE_MODEL = "params.json and the shards are not of one model"
