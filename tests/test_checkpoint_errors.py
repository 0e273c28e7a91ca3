"""An invalid path, folder, params.json or number of shards raises a CheckpointError that names the fault and the way out."""

import json
import math
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoint import validate

from . import changed_checkpoints
from .changed_checkpoints import FIRST, ONE_MODEL, SECOND, TOKENIZER, AssertBuildRaises, change_tensors
from .support import random_weights, write_shards

halves, copy = changed_checkpoints.halves, changed_checkpoints.copy  # fixtures
assert_build_raises = changed_checkpoints.assert_build_raises  # a fixture


@pytest.mark.parametrize("argument", ["ckpt_dir", "tokenizer_path"])
@pytest.mark.parametrize(
    "value, parts",
    [
        ("/nowhere/llama", ("'/nowhere/llama'", "No such file")),
        ("file or folder", ("a file, not a folder", "a folder, not a file")),
        (None, ("None (NoneType)",)),
        (5, ("5 (int)",)),
        (b"model", ("b'model' (bytes)",)),
        (["model"], ("['model'] (list)",)),
        ("model\0", ("null",)),
        ("m" * 5000, ("too long",)),
        ("\ud800", (r"'\ud800'",)),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_an_invalid_path_raises(
    assert_build_raises: AssertBuildRaises, small: SimpleNamespace, argument: str, value: Any, parts: tuple
) -> None:
    limit = "a model's folder, with consolidated.NN.pth" if argument == "ckpt_dir" else "Meta's tokenizer.model"
    good = {"ckpt_dir": small.folder, "tokenizer_path": small.tokenizer_path}
    if value == "file or folder":
        value, parts = (small.tokenizer_path, parts[:1]) if argument == "ckpt_dir" else (small.folder, parts[1:])
    arguments = good | {argument: value}
    if arguments["tokenizer_path"] is None:
        limit, parts = "no tokenizer.model in it", ()  # the default was taken
        argument = "ckpt_dir"
    assert_build_raises(arguments.pop("ckpt_dir"), argument, limit, *parts, **arguments)


@pytest.mark.parametrize(
    "files, parts",
    [
        ([], ("no params.json", "the folder is empty")),
        (["config.json", "model-00001-of-00002.safetensors"], ("no weights in Hugging Face's layout", "index")),
        (["config.json", "pytorch_model.bin"], ("config.json: not JSON", "it is empty")),
        (["model.safetensors"], ("Hugging Face's layout, but no config.json",)),
        (["7b/params.json", "13b/params.json", "tokenizer.model"], ("model folders", "as ckpt_dir", "model/13b, ", "model/7b")),
        (["notes.txt"], ("no params.json", "it contains notes.txt")),
        ([f"{i}.txt" for i in range(99)], ("no params.json", "and more")),
    ],
)
def test_a_folder_without_a_checkpoint_in_metas_layout_raises(
    assert_build_raises: AssertBuildRaises, tmp_path: Path, files: list[str], parts: tuple
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    assert_build_raises(folder, str(folder), *parts)


@pytest.mark.parametrize("name", ["", FIRST, "params.json", TOKENIZER])
def test_an_unreadable_file_or_folder_raises(
    assert_build_raises: AssertBuildRaises, copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A patch raises the PermissionError, because the tests may run as root, who may read every file."""

    def forbid(call: Callable) -> Callable:
        def open_or_forbid(path: Path, *arguments: Any, **options: Any) -> Any:
            if path == copy / name:
                raise PermissionError(13, "Permission denied")
            return call(path, *arguments, **options)

        return open_or_forbid

    monkeypatch.setattr(Path, "open", forbid(Path.open))
    monkeypatch.setattr(os, "listdir", forbid(os.listdir))
    assert_build_raises(copy, str(copy / name), "cannot be read", "Permission denied")


@pytest.mark.parametrize("name", [FIRST, "params.json", TOKENIZER])
def test_a_folder_a_pipe_or_a_dangling_link_in_place_of_a_file_raises(
    assert_build_raises: AssertBuildRaises, copy: Path, name: str
) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    assert_build_raises(copy, str(copy / name), "not a file")
    (copy / name).rmdir()
    os.mkfifo(copy / name)
    assert_build_raises(copy, str(copy / name), "not a file")  # `build` must not open the pipe, which would wait for a writer
    (copy / name).unlink()
    (copy / name).symlink_to("nowhere")
    assert_build_raises(copy, str(copy / name), "No such file")


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "it is an HTML page or XML: the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a git-lfs pointer: run `git lfs pull`"),
        (bytes(range(7, 200)) * 9, "damaged"),
        (bytes(100), "damaged"),
    ],
)
@pytest.mark.parametrize("name", [FIRST, "params.json", TOKENIZER])
def test_a_file_with_other_content_raises_and_names_the_likely_cause(
    assert_build_raises: AssertBuildRaises, copy: Path, name: str, content: bytes, part: str
) -> None:
    what = {FIRST: "not a PyTorch checkpoint", "params.json": "not JSON", TOKENIZER: "not a SentencePiece model"}[name]
    (copy / name).write_bytes(content)
    assert_build_raises(copy, str(copy / name), what, part, "fetch", "again")


COUNT = "a whole number from 1 to 2,147,483,647"


@pytest.mark.parametrize(
    "text, parts",
    [
        (b'{"dim": 64,', ("not JSON", "line 1 column")),
        (b'{"dim": ' + b"9" * 5000 + b"}", ("not JSON", "digits")),
        (b"[" * 100_000, ("not JSON",)),
        (b'{"dim":' * 100_000, ("not JSON", "recursion")),
        (b"[1]", ("[1] (list)", "not an object")),
        (b'{"rope_scaling": 8}', ("unknown key 'rope_scaling'", "rope_theta")),
        (b"{}", ("n_layers=32", "contain 2 layers", ONE_MODEL)),
    ],
)
def test_a_params_json_not_in_metas_format_raises(
    assert_build_raises: AssertBuildRaises, copy: Path, text: bytes, parts: tuple
) -> None:
    (copy / "params.json").write_bytes(text)
    assert_build_raises(copy, "params.json", *parts)


@pytest.mark.parametrize(
    "key, value, parts",
    [
        *[("dim", bad, (f"dim is {bad!r:.40}", COUNT)) for bad in ("64", True, 64.0, None, [], math.nan, math.inf, -1, 0)],
        *[(key, 10**30, (key, COUNT)) for key in ("dim", "n_heads", "n_kv_heads", "multiple_of")],
        *[("n_layers", bad, ("n_layers", "a whole number from 1 to 1,024")) for bad in (10**30, 1025, 0)],
        ("dim", 10**400, ("dim is 1000", COUNT)),
        *[("norm_eps", bad, ("norm_eps is", "between 0 and 1")) for bad in (math.nan, math.inf, 0, -1e-5, 1, "1e-5", True)],
        *[("rope_theta", bad, ("rope_theta is", "1 to 1e18")) for bad in (math.nan, math.inf, 0, 1e-300, 10**30, "1e6")],
        *[("ffn_dim_multiplier", bad, ("ffn_dim_multiplier is", "above 0")) for bad in (math.nan, 1e308, 10**400, 0, "1.3")],
        *[("vocab_size", bad, ("vocab_size is", "-1 (the tokenizer's)")) for bad in (0, -2, 384.0, "384", True, None, 10**30)],
        ("vocab_size", 500, ("vocab_size=500", "tok_embeddings.weight has 384 rows", "set vocab_size to 384")),
        ("n_heads", 5, ("dim=64", "n_heads=5 heads")),
        ("n_heads", 64, ("dim=64", "n_heads=64 heads of even width")),
        ("n_kv_heads", 3, ("n_heads=8", "no multiple of n_kv_heads=3")),
        ("n_layers", 3, ("n_layers=3", "contain 2 layers", ONE_MODEL)),
        ("n_layers", 1, ("n_layers=1", "contain 2 layers", ONE_MODEL)),
        ("dim", 128, ("norm.weight is (64,)", "see dim", "(128,)", ONE_MODEL)),
        ("dim", 32, ("norm.weight is (64,)", "see dim", "(32,)", ONE_MODEL)),
        ("n_kv_heads", 8, ("wk.weight is (32, 64)", "n_kv_heads", "(64, 64)", ONE_MODEL)),
        ("n_kv_heads", None, ("wk.weight is (32, 64)", "n_kv_heads", "(64, 64)", ONE_MODEL)),
        ("multiple_of", 256, ("w1.weight is (192, 64)", "multiple_of", "(256, 64)", ONE_MODEL)),
        ("ffn_dim_multiplier", 1e-9, ("w1.weight is (192, 64)", "ffn_dim_multiplier", "(0, 64)", ONE_MODEL)),
    ],
    ids=lambda value: f"{value!r:.20}" if not isinstance(value, tuple) else "",
)
def test_an_invalid_value_in_params_json_raises_with_the_value_and_the_limit(
    assert_build_raises: AssertBuildRaises, copy: Path, small: SimpleNamespace, key: str, value: Any, parts: tuple
) -> None:
    (copy / "params.json").write_text(json.dumps(small.params | {key: value}))
    assert_build_raises(copy, *parts)


@pytest.mark.parametrize("key", ["n_layers", "dim", "multiple_of", "n_heads"])
@pytest.mark.parametrize("value", [10**9, 2**30])
def test_huge_values_in_params_json_raise_without_taking_time_or_memory(
    assert_build_raises: AssertBuildRaises,
    copy: Path,
    small: SimpleNamespace,
    key: str,
    value: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if key == "n_layers":  # adds a tensor of the last layer, so that the shard agrees with params.json
        change_tensors(copy / FIRST, lambda tensors: tensors.update({f"layers.{value - 1}.x": torch.ones(1)}))
        monkeypatch.setattr(validate, "Transformer", lambda _: pytest.fail("layers were made"))
    (copy / "params.json").write_text(json.dumps(small.params | {key: value}))
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_build_raises(copy, key)
    assert time.monotonic() - start < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000


@pytest.mark.parametrize(
    "n_shards, keep, parts",
    [
        (2, [], ("no consolidated.NN.pth", "it contains params.json")),
        (2, [0], ("(384, 32)", "one of 2 parts of (384, 64)", "there are 1 shards", "missing")),
        (2, [1], (f"{FIRST} missing", SECOND, "all are needed")),
        (4, [0, 1], ("(384, 16)", "one of 4 parts", "there are 2 shards", "missing")),
        (4, [0, 3], (f"{SECOND}, consolidated.02.pth missing", "go up to consolidated.03.pth")),
        (2, {1: "consolidated.1.pth"}, ("(384, 32)", "one of 2 parts", "there are 1 shards", "missing")),
        (2, {0: FIRST, 1: "model.pth"}, None),
        (2, {0: "consolidated.02.pth", 1: "model.pth"}, None),
        (2, {0: "lora_merged.00.pth", 1: "lora_merged.01.pth"}, None),
        (2, {0: "a.2.pth", 1: "a.10.pth"}, ("order of their names", "puts a.2.pth after", "numbers of equal length")),
    ],
)
def test_missing_shards_raise_and_are_named(
    assert_build_raises: AssertBuildRaises,
    tmp_path: Path,
    small: SimpleNamespace,
    n_shards: int,
    keep: list[int] | dict[int, str],
    parts: tuple | None,
) -> None:
    """Keep only some shards, and rename them if `keep` gives new names. Only gaps in Meta's names are reported as such."""
    folder = write_shards(tmp_path / "written", small.params, small.weights, n_shards)
    names = keep if isinstance(keep, dict) else {i: f"consolidated.{i:02d}.pth" for i in keep}
    target = tmp_path / "model"
    target.mkdir()
    shutil.copy(folder / "params.json", target)
    for i, name in names.items():
        shutil.copy(folder / f"consolidated.{i:02d}.pth", target / name)
    if parts is not None:
        assert_build_raises(target, *parts)
    else:
        model = Llama.build(target, small.tokenizer_path, 16, 2, device="cpu").model
        assert all(torch.equal(weight, small.weights[name]) for name, weight in model.state_dict().items())


def test_extra_shards_and_shards_of_another_model_raise(
    assert_build_raises: AssertBuildRaises, tmp_path: Path, small: SimpleNamespace, halves: Path
) -> None:
    def spoiled(source: Path, name: str) -> Path:
        folder = shutil.copytree(halves, tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        shutil.copy(source, folder / name)
        return folder

    twin = write_shards(tmp_path / "twin", small.params, random_weights(small.params, 384, 192, seed=5), 2)
    wide = write_shards(tmp_path / "wide", small.params, random_weights(small.params, 384, 256), 2)
    assert_build_raises(spoiled(halves / SECOND, "consolidated.02.pth"), "one of 2 parts", "there are 3 shards", "too many")
    assert_build_raises(spoiled(twin / SECOND, SECOND), "norm.weight differs", FIRST, SECOND, "different models")
    assert_build_raises(spoiled(wide / SECOND, SECOND), SECOND, "w1.weight is (128, 64)", "(192, 64) in 2 shard(s)", ONE_MODEL)
    assert_build_raises(spoiled(halves / FIRST, SECOND), f"{SECOND} contains the same values as {FIRST}", "fetch it again")
