"""Fixtures for the tests of packed files: folders with a checkpoint and a packed file of its weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama import Llama
from llama.checkpoint import packed_file

from .support import write_shards


@pytest.fixture
def int4_folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write a checkpoint folder with two shards and the packed file int4.safetensors."""
    folder = write_shards(tmp_path / "int4", small.params, small.weights, 2)
    assert packed_file.save_packed_file(folder, "int4") == folder / "int4.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == [
        "consolidated.00.pth", "consolidated.01.pth", "int4.safetensors", "params.json",
    ]  # fmt: skip
    return folder


def build(folder: Path, small: SimpleNamespace, **options: Any) -> Llama:
    return Llama.build(folder, small.tokenizer_path, 32, 2, device="cpu", **{"quantize": "int4"} | options)


@pytest.fixture
def bf16_folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write a checkpoint folder with two shards in bfloat16 and the packed file bfloat16.safetensors."""
    folder = write_shards(tmp_path / "m", small.params, {name: w.bfloat16() for name, w in small.weights.items()}, 2)
    packed_file.save_packed_file(folder, "bfloat16")
    return folder
