"""Test `convert`: there and back gives the same bits, and what it cannot do leaves nothing behind."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, InputError, convert_checkpoint
from llama.checkpoint import convert, safetensors_file
from llama.cli.main import main

from .hugging_face import (
    HEAD_DIM,
    INDEX,
    MODEL,
    build,
    edit_config,
    hugging_face_weights,
    logits,
    write_safetensors,
    write_with_tokenizer,
)  # fmt: skip
from .support import assert_raises, write_shards


@pytest.fixture
def folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write the small model in Hugging Face's layout, in one file, with its tokenizer."""
    return write_with_tokenizer(small, tmp_path)


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each file of a folder, by the file's name."""
    files = {path.name: torch.load(path) for path in folder.glob("*.pth")}
    return files | {path.name: safetensors_file.map_safetensors(path)[1] for path in folder.glob("*.safetensors")}


def assert_same_files(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys() and first
    for name, tensors in first.items():
        assert tensors.keys() - {"rope.freqs"} == second[name].keys() - {"rope.freqs"}
        for key, tensor in tensors.items():
            same = key == "rope.freqs" or torch.equal(tensor, second[name][key])
            assert same and (key == "rope.freqs" or tensor.dtype == second[name][key].dtype), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 2])
def test_converting_there_and_back_gives_the_same_bits(
    small: SimpleNamespace, tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    metas = write_shards(tmp_path / "meta", small.params, weights, shards)
    shutil.copy(small.tokenizer_path, metas / "tokenizer.model")
    theirs = convert_checkpoint(metas, tmp_path / "hf", "hf", shards)
    names = {path.name for path in theirs.iterdir()}
    expected = {MODEL} if shards == 1 else {INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert names == expected | {"config.json", "tokenizer.model", "tokenizer_config.json"}
    back = convert_checkpoint(theirs, tmp_path / "back", "meta", shards)
    assert_same_files(back, metas)
    assert_same_files(convert_checkpoint(back, tmp_path / "again", "hf", shards), theirs)
    stored = {key: w for tensors in tensors_of(theirs).values() for key, w in tensors.items()}
    assert all(torch.equal(w, stored[key]) for key, w in hugging_face_weights(weights, HEAD_DIM).items())
    for folder in (theirs, back):
        assert torch.equal(logits(folder, folder / "tokenizer.model"), logits(metas, small.tokenizer_path))
    checksums = dict(reversed(line.split()) for line in (back / "checklist.chk").read_text().splitlines())
    for name in ("params.json", "consolidated.00.pth"):
        assert checksums[name] == hashlib.md5((back / name).read_bytes()).hexdigest()


def test_shards_are_converted_to_another_number_of_shards(small: SimpleNamespace, tmp_path: Path) -> None:
    one, four = (write_shards(tmp_path / f"{n}", small.params, small.weights, n) for n in (1, 4))
    assert_same_files(convert_checkpoint(one, tmp_path / "to four", "meta", 4), four)
    assert_same_files(convert_checkpoint(four, tmp_path / "to one", "meta"), one)


def test_a_folder_of_hugging_face_keeps_its_settings(folder: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    new = convert_checkpoint(folder, tmp_path / "new", "hf", 2)
    assert (new / "config.json").read_text() == (folder / "config.json").read_text()
    assert (new / "generation_config.json").is_file()
    assert torch.equal(logits(new, small.tokenizer_path), logits(folder, small.tokenizer_path))


def test_convert_refuses_what_it_cannot_do_and_leaves_nothing(
    folder: Path, small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, full = tmp_path / "new", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    before = sorted(tmp_path.iterdir())
    for arguments, error, part in (
        ((folder, full, "meta"), CheckpointError, "exists already"),
        ((folder, folder, "meta"), CheckpointError, "exists already"),
        ((folder, new, "gguf"), InputError, "layout is 'gguf'"),
        ((folder, new, "meta", 0), InputError, "shards is 0"),
        ((folder, new, "meta", 1, "int8"), InputError, "for packed weights, run python -m llama quantize on the result"),
        ((folder, new, "meta", 3), InputError, "can be cut into 1, 2, 4 shards"),
        ((folder, new, "hf", 3), InputError, "the model has 2 layers"),
        ((folder, 3, "hf"), CheckpointError, "target is 3 (int)"),
        ((full, new, "hf"), CheckpointError, "no params.json"),
    ):
        assert_raises(lambda: convert_checkpoint(*arguments), error, part)  # type: ignore[arg-type] # noqa: B023
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    assert_raises(lambda: convert_checkpoint(folder, new, "meta"), CheckpointError, "rope_scaling by 2.0", "keep Hugging")
    edit_config(folder, rope_scaling=None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert_raises(lambda: convert_checkpoint(folder, new, "meta"), CheckpointError, "make room")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_weights_that_are_not_finite_or_change_are_not_converted(
    folder: Path, small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    tensors = hugging_face_weights(small.weights, HEAD_DIM)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][3, 3] = float("inf")
    write_safetensors(folder / "new", tensors)
    (folder / "new").replace(folder / MODEL)
    assert_raises(lambda: convert_checkpoint(folder, tmp_path / "n", layout), CheckpointError, "output.weight contains NaN or")
    check_finite = convert.check_finite

    def touch_and_check(*args: Any) -> None:
        os.utime(folder / MODEL, ns=(0, 5))
        check_finite(*args)

    monkeypatch.setattr(convert, "check_finite", touch_and_check)
    assert_raises(lambda: convert_checkpoint(folder, tmp_path / "n", layout), CheckpointError, "while it was being read")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("n")]


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_are_written_in_the_chosen_dtype(
    folder: Path, small: SimpleNamespace, tmp_path: Path, layout: str, key: str
) -> None:
    edit_config(folder, **{key: "float32", "x": 1})
    new = convert_checkpoint(folder, tmp_path / "new", layout, 2, "bf16")
    expected = {name: weight.bfloat16() for name, weight in small.weights.items()}
    model = build(new, tokenizer_path=small.tokenizer_path, backend="eager").model
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    files = list(tensors_of(new).values())
    assert len(files) == 2 and {tensor.dtype for tensors in files for tensor in tensors.values()} == {torch.bfloat16}
    if layout == "hf":
        assert json.loads((new / "config.json").read_text()) == json.loads((folder / "config.json").read_text()) | {
            key: "bfloat16"
        }
        index = json.loads((new / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in expected.values())
    else:
        config = json.loads((convert_checkpoint(new, tmp_path / "again", "hf", 1, "float16") / "config.json").read_text())
        assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_values_too_large_for_the_dtype_are_not_converted(small: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    name = "layers.1.feed_forward.w2.weight"
    weights = small.weights | {name: small.weights[name].index_fill(0, torch.tensor(3), 7e4)}
    folder = write_shards(tmp_path / "meta", small.params, weights, 2)
    parts = f"{name} contains values too large for torch.float16", "'bfloat16' or 'float32'"
    assert_raises(lambda: convert_checkpoint(folder, tmp_path / "n", layout, 1, "float16"), CheckpointError, *parts)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("n")]
    convert_checkpoint(folder, tmp_path / "n", layout, 1, "bfloat16")


def test_the_command_converts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "16"), "--to", "meta", "--dtype", "bf16"]) == 0
    assert {tensor.dtype for tensors in tensors_of(tmp_path / "16").values() for tensor in tensors.values()} == {torch.bfloat16}
    assert main(["convert", str(folder), str(tmp_path / "new"), "--to", "meta", "--shards", "2"]) == 0
    assert str(tmp_path / "new") in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "params.json").read_text())["n_kv_heads"] == 4
    assert main(["convert", str(folder), str(tmp_path / "new"), "--to", "meta"]) == 1
    assert "exists already" in capsys.readouterr().err
