"""Where it runs: groups that exist, groups from torchrun, none at all; and what is left behind."""

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import DeviceError, Llama
from llama.distributed import groups, progress, setup
from llama.kernels.host_memory import HugePageAllocator
from llama.planning import free_memory

from .support import refused, run, torchrun

OWN_GROUPS = """
import os, sys, torch, torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs
from llama import Llama
from llama.errors import DeviceError
folder, tokenizer, kind = sys.argv[1:]
if kind != "torchrun":
    dist.init_process_group("gloo")
if kind == "model-parallel":
    fs.initialize_model_parallel(2)
first = Llama.build(folder, tokenizer, 32, 2, device="cpu")
again = Llama.build(folder, tokenizer, 32, 2, device="cpu")
assert fs.get_model_parallel_world_size() == 2 == first.model.layers[0].attention.wo.ranks
a, b = (g.generate([[1, 5], [1, 9, 30]], 6, temperature=0) for g in (first, again))
try:
    Llama.build(folder, tokenizer, 32, 2, model_parallel_size=1, device="cpu")
except DeviceError as e:
    print("refused:", "groups of 2" in str(e))
print(a == b, len(a[0][0]))
"""


@pytest.mark.parametrize("kind", ["torchrun", "group", "model-parallel"])
def test_joins_what_the_caller_made_and_builds_twice(small: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN_GROUPS)
    done = torchrun(2, script, small.folder, small.tokenizer_path, kind)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if not line.startswith("> initializing")]
    assert printed == ["refused: True", "True 6"]
    assert ("> initializing" in done.stdout) == (kind == "model-parallel")  # the caller's own call; never ours


def test_a_build_leaves_no_trace_but_the_seed(small: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    """Plain python: no group, no environment variable, no default changed, nothing printed."""

    def state() -> tuple:
        return (
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.get_num_threads(), torch.distributed.is_initialized(), sys.stdout, sys.stderr, dict(os.environ),
        )  # fmt: skip

    before = state()
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", seed=5)
    drawn = torch.rand(3)
    llama.text_completion(["sea"], max_gen_len=4)
    assert state() == before
    assert tuple(capfd.readouterr()) == ("", "")
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_a_world_without_a_rank_is_no_world(small: SimpleNamespace, tmp_path: Path) -> None:
    """Schedulers set WORLD_SIZE alone."""
    script = tmp_path / "own.py"
    script.write_text(
        "import sys\nfrom llama import Llama\n"
        "llama = Llama.build(*sys.argv[1:], 32, 2, device='cpu')\n"
        "print(len(llama.generate([[1, 5]], 3)[0][0]))\n"
    )
    done = run(script, small.folder, small.tokenizer_path, WORLD_SIZE="2")
    assert done.stdout == "3\n", done.stderr


def test_plain_python_opens_no_socket(small: SimpleNamespace, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    script = tmp_path / "own.py"
    script.write_text(
        "import os, sys\nfrom llama import Llama\n"
        "Llama.build(*sys.argv[1:], 32, 2, device='cpu').text_completion(['sea'], max_gen_len=2)\n"
        "fds = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')]\n"
        "print([fd for fd in fds if os.path.exists(fd) and 'socket' in os.readlink(fd)])\n"
    )
    done = run(script, small.folder, small.tokenizer_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "gpus, world, local, asked, want",
    [
        (2, 1, None, None, "cuda:0"),
        (2, 1, None, "cuda:1", "cuda:1"),
        (2, 2, 1, None, "cuda:1"),
        (2, 2, 1, "cuda", "cuda:1"),
        (2, 4, 1, None, "4 ranks on this machine, but 2 GPU"),
        (2, 2, 1, "cuda:0", "would put 2 ranks on one GPU"),
        (2, 1, None, "cuda:5", "cuda:0 to cuda:1"),
        (0, 1, None, "cuda", "sees no CUDA GPU"),
        (0, 1, None, "mps", "no Apple GPU"),
        (0, 1, None, "tpu", "not a device"),
        (0, 1, None, "meta", "not supported"),
        (0, 2, 1, None, "cpu"),
    ],
)
def test_the_choice_of_a_device(
    monkeypatch: pytest.MonkeyPatch, gpus: int, world: int, local: int | None, asked: str | None, want: str
) -> None:
    """On a machine with so many GPUs, in a world of so many ranks all on it, the device or the error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for key, value in (("LOCAL_WORLD_SIZE", world), ("LOCAL_RANK", local)):
        if local is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, str(value))
    if " " in want:
        with pytest.raises(DeviceError, match=want):
            setup.choose_device(asked, world)
    else:
        assert str(setup.choose_device(asked, world)) == want


@pytest.mark.parametrize(
    "addresses, env, ok",
    [
        (["127.0.1.1"], {}, False),
        (["127.0.1.1", "::1"], {}, False),
        ([], {}, False),
        (["127.0.0.1", "10.0.0.1"], {}, True),
        (["fe80::1%eth0"], {}, True),
        (["127.0.1.1"], {"GLOO_SOCKET_IFNAME": "eth0"}, True),
        (["127.0.1.1"], {"LOCAL_WORLD_SIZE": "4"}, True),  # one machine
    ],
)
def test_a_machine_that_others_cannot_find_says_so(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], env: dict[str, str], ok: bool
) -> None:
    def getaddrinfo(name: str, port: object) -> list[tuple]:
        if not addresses:
            raise OSError("no such name")
        return [(0, 0, 0, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "gethostname", lambda: "alpha")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for key, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **env}.items():
        monkeypatch.setenv(key, value)
    if ok:
        groups.check_reachable()
    else:
        refused(groups.check_reachable, DeviceError, "'alpha', leads", "set GLOO_SOCKET_IFNAME")


def test_progress_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.progress([1, 2, 3], lambda n: n * 10**9, "loading")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.progress([1, 2, 3], lambda n: n * 10**9, "loading")) == [1, 2, 3]
    shown = capsys.readouterr().err.split("\r")
    assert shown[-1].startswith("loading [##############################] 6.0 of 6.0 GB")


def test_free_memory_is_known_and_shared_by_the_ranks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory.free_memory(torch.device("cpu"))
    assert free is not None and free > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    quarter = free_memory.free_memory(torch.device("cpu"))
    assert quarter is not None and quarter < free / 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's")
def test_tensors_in_huge_pages_lie_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HugePageAllocator, "chunk_bytes", 4096)
    pages, made = (
        HugePageAllocator(),
        [torch.randn(n, 3).bfloat16() for n in (5, 100, 1000, 7, 600)],
    )  # some larger than what is asked for
    with torch.inference_mode():
        kept = [pages.empty(*x.shape, dtype=x.dtype).copy_(x) for x in made]
    for x, own in zip(made, kept, strict=True):
        assert torch.equal(own, x) and own.is_contiguous() and own.data_ptr() % 64 == 0
    assert kept[1].data_ptr() - kept[0].data_ptr() == 64
