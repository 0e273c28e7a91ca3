"""An invalid checkpoint raises a CheckpointError that names the fault and the way out. Code in a file is never run."""

import json
import math
import os
import pickle
import resource
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, Llama, LlamaError, Tokenizer
from llama.checkpoint import loading, packed_file, validate

from .support import random_weights, run, train_tokenizer, write_shards

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
ONE_MODEL = "params.json and the shards are not of one model"


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


@pytest.mark.parametrize(
    "name, size",
    [(FIRST, n) for n in (1, 2, 10, 64, 0.1, 0.5, 0.9, -100, -1)] + [(TOKENIZER, n) for n in (2, 10, 0.5, -10)],
)
def test_truncated_files_raise(assert_build_raises: AssertBuildRaises, copy: Path, name: str, size: float) -> None:
    original = (copy / name).read_bytes()
    (copy / name).write_bytes(original[: int(size * len(original)) if 0 < size < 1 else int(size)])
    assert_build_raises(copy, str(copy / name), "cut off", "fetch", "again")


def test_other_zip_files_and_json_in_place_of_a_shard_raise(assert_build_raises: AssertBuildRaises, copy: Path) -> None:
    """One of the files is a shard that was compressed again: if it were memory-mapped, its weights would be wrong."""
    with zipfile.ZipFile(copy / FIRST) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (copy / FIRST).write_text('{"error": "no access"}')
    assert_build_raises(copy, str(copy / FIRST), "it is JSON")
    (copy / FIRST).write_bytes(b"PK\x03\x04" + bytes(1000))
    assert_build_raises(copy, str(copy / FIRST), "damaged", "1,004 bytes", "checklist.chk")
    for content in ({"readme.txt": b"hello"}, files):
        with zipfile.ZipFile(copy / FIRST, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        assert_build_raises(copy, str(copy / FIRST), "another kind of zip")


class Bomb:
    """An object that calls a function when it is unpickled."""

    def __init__(self, call: Callable, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("call", ["open", "os.system"])
@pytest.mark.parametrize("how", ["zip", "inside", "old", "2", "3", "4", "5"])
def test_code_in_a_shard_is_never_run(
    assert_build_raises: AssertBuildRaises, copy: Path, tmp_path: Path, call: str, how: str
) -> None:
    marker = tmp_path / "marker"
    bomb = Bomb(open, str(marker), "w") if call == "open" else Bomb(os.system, f"touch '{marker}'")
    if how.isdigit():
        (copy / FIRST).write_bytes(pickle.dumps(bomb, protocol=int(how)))
    else:
        content = {**torch.load(copy / FIRST), "bomb": bomb} if how == "inside" else bomb
        torch.save(content, copy / FIRST, _use_new_zipfile_serialization=how != "old")
    parts = ["could run code"] if how in ("zip", "inside") else ["a bare pickle", "before 1.6", "torch.save() it again"]
    assert_build_raises(copy, str(copy / FIRST), *parts)
    assert not marker.exists()
    torch.load(copy / FIRST, weights_only=False) if not how.isdigit() else pickle.loads((copy / FIRST).read_bytes())
    assert marker.exists()  # the file does run code if it is loaded without protection


PLAIN = "tensors by name and nothing else"


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda t: list(t.values()), ("contains a list", PLAIN)),
        (lambda t: {"model": t}, ("'model' is no plain tensor", PLAIN)),
        (lambda t: t.update(step=5), ("'step' is no plain tensor", PLAIN)),
        (lambda t: t.update({5: torch.ones(1)}), ("5 is no plain tensor", PLAIN)),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].to_sparse()}), (f"'{EMBEDDING}' is no plain tensor", PLAIN)),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].to("meta")}), (f"'{EMBEDDING}' is no plain tensor", PLAIN)),
        (lambda t: t.update({W2: torch.ones(1).expand(64, 192)}), (f"'{W2}' is no plain tensor", PLAIN)),
        (lambda t: t.update({W2: torch.complex(t[W2], t[W2]).conj().imag}), (f"'{W2}' is no plain tensor", PLAIN)),
        (lambda t: t.update({W2: t[W2].to(torch.int8)}), (W2, "torch.int8", "bfloat16, float16 and float32", "convert")),
        (lambda t: t.update({W2: t[W2].double()}), (W2, "torch.float64", "bfloat16, float16 and float32")),
        (lambda t: t.update({NORM: t[NORM] > 1}), (NORM, "torch.bool", "bfloat16, float16 and float32")),
        (lambda t: t.clear(), ("n_layers=2", "contain 0 layers")),
        (lambda t: t.update({"layers." + "9" * 5000: torch.ones(1)}), ("n_layers=2", "contain 3 layers")),
        (lambda t: {k: v for k, v in t.items() if k != W2}, (FIRST, f"lacks {W2}", "damaged", "every .pth file")),
        (lambda t: {k: v for k, v in t.items() if "norm" not in k}, (FIRST, "lacks", "and 2 more")),
        (
            lambda t: t.update(lora=torch.ones(1)),
            (FIRST, "contains unknown lora", "if it can do without them", "torch.save() it again"),
        ),
        (lambda t: t.update({"rope.freqs.weight": torch.ones(1)}), (FIRST, "contains unknown rope.freqs.weight")),
        (lambda t: t.update({"x" * 200_000: torch.ones(1)}), (FIRST, "contains unknown xxxx")),
        (lambda t: t.update({"\x1b[2J": torch.ones(1)}), (FIRST, r"contains unknown \x1b[2J")),
        (lambda t: t.update({W2: t[W2].T.contiguous()}), (f"{W2} is (192, 64)", "(64, 192)", ONE_MODEL)),
        (lambda t: t.update({NORM: torch.ones(1, 64)}), (f"{NORM} is (1, 64)", "(64,)", ONE_MODEL)),
        (lambda t: t.update({EMBEDDING: torch.tensor(1.0)}), (f"{EMBEDDING} is ()", "(384, 64)", ONE_MODEL)),
        (lambda t: t.update({EMBEDDING: torch.ones(400, 64)}), ("output.weight is (384, 64)", "(400, 64)", "same rows")),
    ],
)
def test_a_shard_with_other_contents_than_the_models_tensors_raises(
    assert_build_raises: AssertBuildRaises, copy: Path, change: Callable[[dict], Any], parts: tuple
) -> None:
    change_tensors(copy / FIRST, change)
    assert_build_raises(copy, *parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [EMBEDDING, W2, NORM, "norm.weight", "output.weight"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_or_infinity_in_any_weight_raises(
    assert_build_raises: AssertBuildRaises, tmp_path: Path, halves: Path, dtype: torch.dtype, name: str, value: float
) -> None:
    """Damage the last value of a weight in the second shard; if it is a norm, in both shards, as norms must be equal."""
    folder = shutil.copytree(halves, tmp_path / "model")
    for file in (FIRST, SECOND):

        def change(tensors: dict, spoil: bool = file == SECOND or "norm" in name) -> dict:
            tensors = {k: v.to(dtype) for k, v in tensors.items()}
            tensors[name].view(-1)[-1] = value if spoil else 1
            return tensors

        change_tensors(folder / file, change)
    assert_build_raises(folder, name, "NaN or infinity", "checklist.chk", reads=True)


def test_weights_too_large_for_the_dtype_raise(
    assert_build_raises: AssertBuildRaises, copy: Path, small: SimpleNamespace
) -> None:
    change_tensors(copy / FIRST, lambda tensors: tensors.update({W2: tensors[W2] * 1e6}))
    assert_build_raises(copy, W2, "too large for torch.float16", "'bfloat16'", reads=True, dtype="float16")
    model = Llama.build(copy, small.tokenizer_path, 16, 2, device="cpu", dtype="bfloat16").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_unusual_but_valid_checkpoints_load(copy: Path, small: SimpleNamespace) -> None:
    """Load mixed dtypes, weights whose sum overflows, nn.Parameters, an OrderedDict, strided tensors, and JSON with a BOM."""

    def check(change: Callable[[dict], Any], dtype: torch.dtype) -> None:
        change_tensors(copy / FIRST, change)
        stored = torch.load(copy / FIRST)
        llama = Llama.build(copy, small.tokenizer_path, 16, 2, device="cpu")
        model = llama.model
        assert {p.dtype for p in model.parameters()} == {llama.engine.forward().cache.data.dtype} == {dtype}
        assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in model.state_dict().items())
        assert not any(p.requires_grad for p in model.parameters())

    check(lambda t: OrderedDict((k, torch.nn.Parameter(v)) for k, v in t.items()), torch.float32)
    check(lambda t: t.update({W2: t[W2].T.contiguous().T}), torch.float32)
    (copy / "params.json").write_bytes(b"\xef\xbb\xbf" + (copy / "params.json").read_bytes())
    check(lambda t: {k: v.detach().half() for k, v in t.items()}, torch.float16)
    check(lambda t: t.update({W2: torch.full((64, 192), 60000.0).half()}), torch.float16)
    check(lambda t: {k: v.bfloat16() for k, v in t.items()}, torch.bfloat16)
    check(
        lambda t: t.update({NORM: t[NORM].float(), W2: t[W2].half()}), torch.bfloat16
    )  # the embeddings determine the dtype of the model


def test_a_tokenizer_with_another_vocabulary_size_raises(
    assert_build_raises: AssertBuildRaises, tmp_path: Path, llama: Llama, small: SimpleNamespace, halves: Path
) -> None:
    path = train_tokenizer(tmp_path / TOKENIZER, 400)
    for folder in (small.folder, halves):
        assert_build_raises(
            folder, EMBEDDING, "(384, ", "tokenizer has 400 tokens", "model's own tokenizer.model", tokenizer_path=path
        )
    with pytest.raises(CheckpointError, match=r"vocabulary of 384, .* 400 tokens"):
        Llama(llama.model, Tokenizer(path))


UNABLE_TO_MMAP = "unable to mmap 303809 bytes from file <consolidated.00.pth>: {} ({})"
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: Error code 12 (Cannot ...)"
)


@pytest.mark.parametrize(
    "error, parts",
    [
        (RuntimeError(UNABLE_TO_MMAP.format("Cannot allocate memory", 12)), ("Cannot allocate memory", "raise `ulimit -v`")),
        (RuntimeError("unable to open file <x> in read-only mode: Too many open files (24)"), ("Too many", "`ulimit -n`")),
        (RuntimeError("unable to open file <x> in read-only mode: Permission denied (13)"), ("Permission denied",)),
        (RuntimeError(NO_MEMORY), ("Cannot allocate memory", "raise `ulimit -v`")),
        (MemoryError(), ("Cannot allocate memory", "raise `ulimit -v`")),
        (OSError(5, "Input/output error"), ("Input/output error", "check the disk or the network")),
        (OSError(116, "Stale file handle"), ("Stale file handle",)),
    ],
    ids=lambda value: f"{value!r:.40}" if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("file", [FIRST, "int8.safetensors"])
def test_an_error_of_the_system_keeps_its_reason_and_is_not_called_damage(
    copy: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, file: str, error: Exception, parts: tuple
) -> None:
    quantize = None if file == FIRST else "int8"
    if quantize:
        packed_file.save_packed_file(copy, quantize)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    with pytest.raises(CheckpointError) as caught:
        Llama.build(copy, small.tokenizer_path, 16, 2, device="cpu", quantize=quantize)
    message = str(caught.value)
    assert [part for part in (file, "cannot be read", *parts) if part not in message] == []
    assert "damaged" not in message and "fetch" not in message and "make it again" not in message


def test_an_error_of_the_disk_while_a_zip_is_read_is_not_called_damage(
    assert_build_raises: AssertBuildRaises, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "infolist", fail)
    assert_build_raises(copy, f"{FIRST}: cannot be read: Input/output error; check the disk")


BUILD_WITH_LITTLE_ADDRESS_SPACE = """
import resource, sys
from llama import Llama, LlamaError
folder, tokenizer, tiny = sys.argv[1:]
Llama.build(tiny, tokenizer, 16, 1, device="cpu")  # loads all code before the limit is set
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
try:
    Llama.build(folder, tokenizer, 16, 1, device="cpu")
except LlamaError as e:
    print(e)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_too_little_address_space_for_a_shard_raises_with_the_way_out(tmp_path: Path, small: SimpleNamespace) -> None:
    params = small.params | {"dim": 512}
    folder = write_shards(tmp_path / "big", params, random_weights(params, 384, 1376))  # a shard of 24.8 MB
    done = run("-c", BUILD_WITH_LITTLE_ADDRESS_SPACE, folder, small.tokenizer_path, small.folder)
    assert f"{FIRST}: cannot be read: Cannot allocate memory; raise `ulimit -v`" in done.stdout, done.stderr
