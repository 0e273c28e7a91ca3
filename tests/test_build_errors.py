"""Test that bad arguments of `Llama.build` raise a LlamaError, also under `python -O` and on two ranks."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import DeviceError, InputError, Llama, LlamaError
from llama.checkpoint import params

from .support import assert_raises, random_weights, run, torchrun, write_shards

# --- build -----------------------------------------------------------------------------------------------------------

WHOLE, RANKS, DEVICES = "a whole number", "a number of ranks, from 1 to 2,147,483,647", "'cpu', 'cuda'"
DTYPES = "use 'bfloat16', 'float16' or 'float32'"


@pytest.mark.parametrize(
    "name, value, error, parts",
    [
        *[
            (name, bad, InputError, (f"{name} is {bad!r:.20}", WHOLE))
            for name in ("max_seq_len", "max_batch_size")
            for bad in (0, -1, 1.5, True, "8", None, math.nan, 2**31, 10**400)
        ],
        *[("seed", bad, InputError, (f"seed is {bad!r:.20}", WHOLE)) for bad in (1.5, "1", None, True, 2**64, -(2**63) - 1)],
        *[
            ("dtype", bad, InputError, ("dtype is", DTYPES))
            for bad in ("int8", "float64", "foo", "nn", "", 5, True, torch.int8)
        ],
        *[("device", bad, DeviceError, ("device=", DEVICES)) for bad in ("foo", "", "cuda:x", True, [], 1.5, 10**30)],
        *[("device", bad, DeviceError, (f"device='{bad}' is not supported", DEVICES)) for bad in ("meta", "xpu")],
        *[("backend", bad, InputError, ("backend is", "'auto'", "'eager'")) for bad in ("foo", "", "CPU", None, 5, True, [])],
        *[
            ("backend", bad, DeviceError, (f"backend='{bad}'", "for CUDA", "'auto'"))
            for bad in ("cuda_graphs", "torch_compile")
        ],
        ("device", "cuda", DeviceError, ("device='cuda'", "no CUDA GPU", "use device='cpu'")),
        *[("model_parallel_size", bad, DeviceError, (f"is {bad!r}", RANKS)) for bad in (0, -1, "2", 1.0, True)],
        ("model_parallel_size", 2, DeviceError, ("=2 does not divide the 1 running", "torchrun --nproc_per_node 2")),
    ],
    ids=lambda value: f"{value!r:.20}" if not isinstance(value, tuple) else "",
)
def test_build_refuses_bad_arguments_before_it_reads_a_file(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, error: type[LlamaError], parts: tuple
) -> None:
    monkeypatch.setattr(params, "read_params", lambda _: pytest.fail("files were read"))
    arguments = {"max_seq_len": 16, "max_batch_size": 2, "device": "cpu"} | {name: value}
    assert_raises(lambda: Llama.build("folder", "tokenizer.model", **arguments), error, *parts)


def test_rank_and_world_size_without_a_master_address_are_refused(
    monkeypatch: pytest.MonkeyPatch, small: SimpleNamespace
) -> None:
    """Set RANK and WORLD_SIZE, but neither MASTER_ADDR nor MASTER_PORT, as some batch systems do."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    parts = ("MASTER_ADDR", "torchrun", "unset RANK and WORLD_SIZE")
    assert_raises(lambda: Llama.build(small.folder, small.tokenizer_path, 16, 2, device="cpu"), DeviceError, *parts)


# --- other ways to run -----------------------------------------------------------------------------------------------

UNDER_O = """
import math, sys
from llama import Llama, LlamaError, Tokenizer

folder, tokenizer_path = sys.argv[1:]
llama = Llama.build(folder, tokenizer_path, 16, 2, device="cpu")
user = {"role": "user", "content": "hello"}
calls = {
    "size": lambda: Llama.build(folder, tokenizer_path, 0),
    "dtype": lambda: Llama.build(folder, tokenizer_path, dtype="int8"),
    "device": lambda: Llama.build(folder, tokenizer_path, device="foo"),
    "ranks": lambda: Llama.build(folder, tokenizer_path, model_parallel_size=2, device="cpu"),
    "memory": lambda: Llama.build(folder, tokenizer_path, 10**9, 10**6, device="cpu"),
    "folder": lambda: Llama.build(folder + "/none", tokenizer_path, device="cpu"),
    "tokenizer": lambda: Tokenizer(folder + "/params.json"),
    "shards": lambda: Llama.build(folder + "/truncated", tokenizer_path, device="cpu"),
    "tokens": lambda: llama.generate([[384]], 4),
    "empty": lambda: llama.generate([[]], 4),
    "long": lambda: llama.generate([[1] * 17], 4),
    "seeds": lambda: llama.generate([[1]] * 3, 4, seed=[1, 2]),
    "stop": lambda: llama.text_completion(["a"], stop=""),
    "temperature": lambda: llama.generate([[1]], 4, temperature=math.nan),
    "text": lambda: llama.text_completion("hello"),
    "roles": lambda: llama.chat_completion([[user, user]]),
    "decode": lambda: llama.tokenizer.decode([-1]),
    "start_pos": lambda: llama.model.forward(llama.model.output.weight[:1].long(), 0),
}
for name, call in calls.items():
    try:
        call()
        print(name, "passed")
    except LlamaError as e:
        if not (isinstance(e, ValueError) and isinstance(e, AssertionError)):
            print(name, "raised a LlamaError that is no ValueError or no AssertionError:", type(e))
print("optimized" if sys.flags.optimize and not __debug__ else "not optimized", len(calls))
"""


def test_bad_input_is_refused_under_python_dash_o(small: SimpleNamespace, tmp_path: Path) -> None:
    """Run bad calls under `python -O`, which removes assert statements. Arguments must therefore be checked without assert
    statements."""
    folder = write_shards(tmp_path / "model", small.params, small.weights)
    truncated = write_shards(folder / "truncated", small.params, small.weights) / "consolidated.00.pth"
    truncated.write_bytes(truncated.read_bytes()[:1000])
    (tmp_path / "script.py").write_text(UNDER_O)
    done = run("-O", tmp_path / "script.py", folder, small.tokenizer_path)
    assert done.stdout.split("\n")[0] == "optimized 18", done.stdout + done.stderr


ON_RANKS = """
import os, sys
from pathlib import Path
from llama import Llama, LlamaError

good, one_head, tokenizer_path, out = sys.argv[1:]
rank = os.environ["RANK"]
for name, folder in (("one rank", good + "/none" * int(rank)), ("heads", one_head)):
    try:
        Llama.build(folder, tokenizer_path, 16, 2, device="cpu")
    except LlamaError as e:
        Path(out, f"{name} {rank}").write_text(f"{type(e).__name__}: {e}")
        if name == "heads":
            raise
"""


def test_an_error_on_one_rank_ends_all_ranks_and_each_names_the_cause(small: SimpleNamespace, tmp_path: Path) -> None:
    """Build from a folder that does not exist on rank 1. Then, in the same processes, build a model with fewer key/value heads
    than ranks. If ranks waited for each other, `torchrun` would time out and fail the test."""
    params = {**small.params, "n_kv_heads": 1}
    one_head = write_shards(tmp_path / "one_head", params, random_weights(params, 384, 192))
    (tmp_path / "script.py").write_text(ON_RANKS)
    done = torchrun(2, tmp_path / "script.py", small.folder, one_head, small.tokenizer_path, tmp_path)
    assert done.returncode != 0 and "key/value heads" in done.stderr
    errors = {path.name: path.read_text() for path in tmp_path.glob("* [01]")}
    assert errors["one rank 0"].startswith("LlamaError: rank 1 failed, so every rank stops: CheckpointError: ckpt_dir is ")
    assert errors["one rank 1"].startswith("CheckpointError: ckpt_dir is ") and "No such file" in errors["one rank 1"]
    for rank in (0, 1):
        assert errors[f"heads {rank}"] == "DeviceError: key/value heads: 1 cannot be divided among 2 ranks; use one of 1"
