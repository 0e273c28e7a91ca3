"""Loading: what it holds in memory, and that nothing of the files is changed."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, Llama, Tokenizer
from llama.checkpoint import loading, shards, validate

from .conftest import SMALL
from .support import random_weights, refused, run, write_shards

BIG = dict(dim=512, n_layers=4, n_heads=8, multiple_of=64, norm_eps=1e-5, vocab_size=-1), 1408  # 51 MB in float32

MEASURE = """
import sys, torch
from llama import Llama
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
folder, tokenizer, tiny = sys.argv[1:]
Llama.build(tiny, tokenizer, 16, 1, device="cpu").generate([[1, 5]], 2)  # a tiny one: what code and threads take
before = status("VmRSS:")
Llama.build(folder, tokenizer, 16, 1, device="cpu")
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("n_shards", [1, 4])
def test_a_model_stands_in_memory_once(tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path, n_shards: int) -> None:
    """One shard is mapped in place; several are joined, and their pages handed back as they are read: never twice."""
    params, hidden = BIG
    folder = write_shards(tmp_path / "big", params, random_weights(params, 384, hidden), n_shards)
    size = sum(p.stat().st_size for p in folder.glob("*.pth"))
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = run(script, folder, tokenizer_path, small.folder)
    assert done.returncode == 0, done.stderr
    assert 0.9 * size < int(done.stdout) < 1.25 * size


def test_weights_may_be_changed_and_the_file_is_not(tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path) -> None:
    """Fine-tuners write into weights; the mapping is private."""
    folder = write_shards(tmp_path, small.params, small.weights)
    file = folder / "consolidated.00.pth"
    before = hashlib.md5(file.read_bytes()).hexdigest()
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    with torch.no_grad():
        for p in llama.model.parameters():
            p.mul_(2)
    assert hashlib.md5(file.read_bytes()).hexdigest() == before
    again = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    changed = llama.model.state_dict()
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, small.weights[name]) and torch.equal(changed[name], 2 * weight)


def test_a_deleted_checkpoint_goes_on_serving(tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path) -> None:
    folder = write_shards(tmp_path, small.params, small.weights)
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    want = llama.generate([[1, 5]], 5, temperature=0)
    (folder / "consolidated.00.pth").unlink()
    assert llama.generate([[1, 5]], 5, temperature=0) == want


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_the_stored_dtype_or_the_one_asked_for(
    tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path, stored: torch.dtype, asked: str | None
) -> None:
    weights = {name: w.to(stored) for name, w in small.weights.items()}
    llama = Llama.build(write_shards(tmp_path, small.params, weights, 2), tokenizer_path, 16, 1, device="cpu", dtype=asked)
    want = getattr(torch, asked) if asked else stored
    for name, weight in llama.model.state_dict().items():
        assert weight.dtype == want and torch.equal(weight, weights[name].to(want))


@pytest.mark.parametrize("value, dtype, says", [(float("nan"), None, "holds NaN"), (1e6, "float16", "holds numbers too large")])
def test_of_weights_multiplied_as_one_the_damaged_is_named(
    tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path, value: float, dtype: str | None, says: str
) -> None:
    name = "layers.1.feed_forward.w3.weight"
    weights = small.weights | {name: small.weights[name].clone()}
    weights[name][-1, -1] = value
    with pytest.raises(CheckpointError, match=rf"^layers\.1\.feed_forward\.w3\.weight {says}"):
        Llama.build(write_shards(tmp_path, small.params, weights, 2), tokenizer_path, 16, 2, device="cpu", dtype=dtype)


def test_shards_of_any_names_are_joined_in_their_order(tmp_path: Path, small: SimpleNamespace, tokenizer_path: Path) -> None:
    """As the reference does, whatever they are called; and with the frequencies that older files hold for each layer."""
    folder = write_shards(tmp_path, small.params, small.weights, 2)
    for old, new in (("consolidated.00.pth", "my model.2.pth"), ("consolidated.01.pth", "my model.3.pth")):
        tensors = torch.load(folder / old)
        tensors["layers.1.attention.inner_attention.rope.freqs"] = torch.ones(4)
        torch.save(tensors, folder / new)
        (folder / old).unlink()
    llama = Llama.build(folder, tokenizer_path, 16, 1, device="cpu")
    assert all(torch.equal(weight, small.weights[name]) for name, weight in llama.model.state_dict().items())


def altered(folder: Path, change: Callable[[dict], None], n: int = 2) -> Path:
    """A checkpoint in n shards, of which the last holds something else."""
    write_shards(folder, SMALL, random_weights(SMALL, 384, 192), n)
    path = folder / f"consolidated.{n - 1:02d}.pth"
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)
    return folder


def test_norms_of_two_shards_may_differ_by_rounding_only(tmp_path: Path, tokenizer_path: Path) -> None:
    folder = altered(tmp_path / "m", lambda t: t["norm.weight"].add_(0.15))
    call = lambda: Llama.build(folder, tokenizer_path, 16, 1, device="cpu")  # noqa: E731
    refused(call, CheckpointError, "norm.weight differs between")


def test_rows_of_zeros_are_no_copy_of_a_shard(tmp_path: Path, tokenizer_path: Path) -> None:
    weights = random_weights(SMALL, 384, 192)
    weights["layers.0.attention.wq.weight"][::32] = 0
    Llama.build(write_shards(tmp_path / "m", SMALL, weights, 2), tokenizer_path, 16, 1, device="cpu")


def test_a_file_s_stamp_has_its_time(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"ab")
    before = shards.file_identity(path)
    os.utime(path, ns=(0, before[3] + 1))
    assert shards.file_identity(path) != before


def test_a_build_is_told_from_another_by_its_norms(small: SimpleNamespace, tokenizer: Tokenizer) -> None:
    model: Any = SimpleNamespace(params=1)
    files = shards.open_shards(small.folder)
    one = repr(validate.build_fingerprint(tokenizer, files, model, torch.float32))
    files["consolidated.00.pth"]["norm.weight"] = files["consolidated.00.pth"]["norm.weight"] + 1
    assert one != repr(validate.build_fingerprint(tokenizer, files, model, torch.float32))


def test_weights_lie_where_kernels_read_them_best(tmp_path: Path, tokenizer_path: Path) -> None:
    """Whatever the offsets and strides in the file."""

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name, t in tensors.items():
            if t.ndim == 2:
                odd = torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
                tensors[name] = odd if name.endswith("wo.weight") else t.t().contiguous().t()

    llama = Llama.build(altered(tmp_path / "m", turn, 1), tokenizer_path, 16, 1, device="cpu")
    assert all(p.is_contiguous() and p.data_ptr() % 64 == 0 for p in llama.model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("at", [1, 15])
def test_a_shard_touched_while_it_is_read(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At the first weight, it is noticed before the second is read; at the last, before the model is given out."""
    folder = shutil.copytree(small.folder, tmp_path / "m")
    read: list[int] = []
    look = loading.check_finite

    def touched(*args: Any) -> None:
        read.append(1)
        if len(read) == at:
            os.utime(folder / "consolidated.00.pth", ns=(0, 5))
        look(*args)

    monkeypatch.setattr(loading, "check_finite", touched)
    call = lambda: Llama.build(folder, small.tokenizer_path, 16, 1, device="cpu")  # noqa: E731
    refused(call, CheckpointError, "while it was being read")
    assert len(read) == at
