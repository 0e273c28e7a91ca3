"""Loading checkpoints: memory use, dtypes and shards. Loading changes no file, and raises if a file changes meanwhile."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, Llama, Tokenizer, info, plan, tuning
from llama.checkpoint import loading, packed_file, shards, validate

from .conftest import SMALL
from .support import assert_raises, random_weights, run, write_shards

BIG = dict(dim=512, n_layers=4, n_heads=8, multiple_of=64, norm_eps=1e-5, vocab_size=-1), 1408  # weights of 51 MB in float32

MEASURE = """
import sys, torch
from llama import Llama
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
folder, tokenizer, tiny = sys.argv[1:]
Llama.build(tiny, tokenizer, 16, 1, device="cpu").generate([[1, 5]], 2)  # a tiny model allocates what code and threads need
before = status("VmRSS:")
Llama.build(folder, tokenizer, 16, 1, device="cpu")
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("n_shards", [1, 4])
def test_loading_never_needs_memory_for_two_copies_of_the_weights(
    tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path, n_shards: int
) -> None:
    """One shard is memory-mapped. Several shards are concatenated, and their pages are released as soon as they are read."""
    params, hidden = BIG
    folder = write_shards(tmp_path / "big", params, random_weights(params, 384, hidden), n_shards)
    size = sum(p.stat().st_size for p in folder.glob("*.pth"))
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = run(script, folder, tokenizer_path, small.folder)
    assert done.returncode == 0, done.stderr
    assert 0.9 * size < int(done.stdout) < 1.25 * size


def test_writing_into_weights_does_not_change_the_file(tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path) -> None:
    """Fine-tuning writes into the weights, which are a private mapping of the file."""
    folder = write_shards(tmp_path, small.params, small.weights)
    file = folder / "consolidated.00.pth"
    before = hashlib.md5(file.read_bytes()).hexdigest()
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    with torch.no_grad():
        for p in llama.model.parameters():
            p.mul_(2)
    assert hashlib.md5(file.read_bytes()).hexdigest() == before
    reloaded = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    changed = llama.model.state_dict()
    for name, weight in reloaded.model.state_dict().items():
        assert torch.equal(weight, small.weights[name]) and torch.equal(changed[name], 2 * weight)


def test_a_model_still_generates_after_its_checkpoint_is_deleted(
    tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path
) -> None:
    folder = write_shards(tmp_path, small.params, small.weights)
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    want = llama.generate([[1, 5]], 5, temperature=0)
    (folder / "consolidated.00.pth").unlink()
    assert llama.generate([[1, 5]], 5, temperature=0) == want


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_weights_have_the_stored_dtype_or_the_dtype_argument(
    tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path, stored: torch.dtype, dtype: str | None
) -> None:
    weights = {name: w.to(stored) for name, w in small.weights.items()}
    llama = Llama.build(write_shards(tmp_path, small.params, weights, 2), tokenizer_path, 16, 1, device="cpu", dtype=dtype)
    want = getattr(torch, dtype) if dtype else stored
    for name, weight in llama.model.state_dict().items():
        assert weight.dtype == want and torch.equal(weight, weights[name].to(want))


@pytest.mark.parametrize("value, dtype, message", [(float("nan"), None, "contains NaN"), (1e6, "float16", "contains values")])
def test_the_error_names_the_damaged_weight_among_merged_weights(
    tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path, value: float, dtype: str | None, message: str
) -> None:
    name = "layers.1.feed_forward.w3.weight"
    weights = small.weights | {name: small.weights[name].clone()}
    weights[name][-1, -1] = value
    with pytest.raises(CheckpointError, match=rf"^layers\.1\.feed_forward\.w3\.weight {message}"):
        Llama.build(write_shards(tmp_path, small.params, weights, 2), tokenizer_path, 16, 2, device="cpu", dtype=dtype)


def test_shards_with_any_file_names_are_loaded_in_sorted_order(
    tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path
) -> None:
    """The reference also sorts the names of all *.pth files. The test adds RoPE frequencies per layer, as in older files."""
    folder = write_shards(tmp_path, small.params, small.weights, 2)
    for old, new in (("consolidated.00.pth", "my model.2.pth"), ("consolidated.01.pth", "my model.3.pth")):
        tensors = torch.load(folder / old)
        tensors["layers.1.attention.inner_attention.rope.freqs"] = torch.ones(4)
        torch.save(tensors, folder / new)
        (folder / old).unlink()
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    assert all(torch.equal(weight, small.weights[name]) for name, weight in llama.model.state_dict().items())


def altered(folder: Path, change: Callable[[dict], None], n: int = 2) -> Path:
    """Write a checkpoint in n shards, with the tensors of the last shard altered by `change`; return its folder."""
    write_shards(folder, SMALL, random_weights(SMALL, 384, 192), n)
    path = folder / f"consolidated.{n - 1:02d}.pth"
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)
    return folder


def test_norms_that_differ_between_shards_raise(tmp_path: Path, tokenizer_path: Path) -> None:
    folder = altered(tmp_path / "m", lambda t: t["norm.weight"].add_(0.15))
    call = lambda: Llama.build(folder, tokenizer_path, 16, 1, device="cpu")  # noqa: E731
    assert_raises(call, CheckpointError, "norm.weight differs between")


def test_rows_of_zeros_are_not_mistaken_for_a_copied_shard(tmp_path: Path, tokenizer_path: Path) -> None:
    weights = random_weights(SMALL, 384, 192)
    weights["layers.0.attention.wq.weight"][::32] = 0
    Llama.build(write_shards(tmp_path / "m", SMALL, weights, 2), tokenizer_path, 16, 1, device="cpu")


def test_the_identity_of_a_file_includes_its_modification_time(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"ab")
    before = shards.file_identity(path)
    os.utime(path, ns=(0, before[3] + 1))
    assert shards.file_identity(path) != before


def test_the_fingerprint_of_a_build_depends_on_its_norms(small: SimpleNamespace, tokenizer: Tokenizer) -> None:
    model: Any = SimpleNamespace(params=1)
    files = shards.open_shards(small.folder)
    fingerprint = repr(validate.build_fingerprint(tokenizer, files, model, torch.float32))
    files["consolidated.00.pth"]["norm.weight"] = files["consolidated.00.pth"]["norm.weight"] + 1
    assert fingerprint != repr(validate.build_fingerprint(tokenizer, files, model, torch.float32))


def test_loaded_weights_are_contiguous_and_aligned(tmp_path: Path, tokenizer_path: Path) -> None:
    """Load a file with unaligned and transposed weights."""

    def misalign(tensors: dict[str, torch.Tensor]) -> None:
        for name, t in tensors.items():
            if t.ndim == 2:
                odd = torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
                tensors[name] = odd if name.endswith("wo.weight") else t.t().contiguous().t()

    llama = Llama.build(altered(tmp_path / "m", misalign, 1), tokenizer_path, 16, 1, device="cpu")
    assert all(p.is_contiguous() and p.data_ptr() % 64 == 0 for p in llama.model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("nth_weight", [1, 15])
def test_a_shard_that_changes_while_it_is_read_raises(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth_weight: int
) -> None:
    """A change at the first weight raises before the second is read. A change at the last one raises before `build` returns."""
    folder = shutil.copytree(small.folder, tmp_path / "m")
    read: list[int] = []
    check_finite = loading.check_finite

    def touch_then_check(*args: Any) -> None:
        read.append(1)
        if len(read) == nth_weight:
            os.utime(folder / "consolidated.00.pth", ns=(0, 5))
        check_finite(*args)

    monkeypatch.setattr(loading, "check_finite", touch_then_check)
    call = lambda: Llama.build(folder, small.tokenizer_path, 16, 1, device="cpu")  # noqa: E731
    assert_raises(call, CheckpointError, "while it was being read")
    assert len(read) == nth_weight


@pytest.fixture
def unmappable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch fail to map files, as on a file system without mmap."""

    def fail(path: str, _: bool, size: int) -> Any:
        raise RuntimeError(f"unable to mmap {size} bytes from file <{path}>: No such device (19)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)


@pytest.mark.usefixtures("unmappable")
@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_files_that_cannot_be_mapped_are_read_into_memory(
    tmp_path: Path, small: SimpleNamespace, capsys: pytest.CaptureFixture[str], n_shards: int, dtype: str | None
) -> None:
    """In one shard, embedding and output share a storage, which must keep its values after one of them has been copied."""
    weights = small.weights | {"output.weight": small.weights["tok_embeddings.weight"]}
    folder = write_shards(tmp_path, small.params, weights, n_shards)
    if n_shards == 1:
        tensors = torch.load(folder / "consolidated.00.pth")
        torch.save(tensors | {"output.weight": tensors["tok_embeddings.weight"]}, folder / "consolidated.00.pth")
    llama = Llama.build(folder, small.tokenizer_path, 16, 1, device="cpu", dtype=dtype)
    note = "cannot be memory-mapped, so it is read into memory: unable to mmap"
    assert capsys.readouterr().err.count(note) == n_shards
    for name, weight in llama.model.state_dict().items():
        assert torch.equal(weight, weights[name].to(weight.dtype))


@pytest.mark.parametrize("format", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_quantized_and_packed_weights_are_the_same_without_mapping(
    tmp_path: Path, small: SimpleNamespace, request: pytest.FixtureRequest, monkeypatch: Any, format: str, packed: bool
) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    quantize = None if format == "bfloat16" else format
    folder = write_shards(tmp_path, small.params, {k: w.bfloat16() for k, w in small.weights.items()}, 2)

    def answers() -> list[Any]:
        if packed:
            packed_file.save_packed_file(folder, format)
        llama = Llama.build(folder, small.tokenizer_path, 16, 1, device="cpu", quantize=quantize)
        return [*llama.generate([[1, 5, 9]], 8, temperature=0, logprobs=True)]

    want = answers()
    request.getfixturevalue("unmappable")
    assert answers() == want


def test_a_plan_and_a_report_map_no_file(tmp_path: Path, small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need only shapes and dtypes, so they work without address space for the shards."""
    want = plan(ckpt_dir=small.folder, memory=1, bandwidth=1), info(small.folder, device="cpu")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", lambda *_: pytest.fail("a file was mapped"))
    assert (plan(ckpt_dir=small.folder, memory=1, bandwidth=1), info(small.folder, device="cpu")) == want
