"""Loading: what it holds in memory, and that nothing of the files is changed."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import CheckpointError, Llama

from .support import random_weights, run, write_shards

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
