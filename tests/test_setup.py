"""Test importing the library, and building models with and without process groups: devices, environment variables and side
effects."""

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

from .support import assert_raises, run, torchrun

ENVIRONMENT = "THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
BUILD_IN_GROUPS = """
import os, sys, torch, torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs
from llama import Llama
from llama.errors import DeviceError
folder, tokenizer, existing_groups = sys.argv[1:]
if existing_groups != "none":
    dist.init_process_group("gloo")
if existing_groups == "model-parallel":
    fs.initialize_model_parallel(2)
first = Llama.build(folder, tokenizer, 32, 2, device="cpu")
second = Llama.build(folder, tokenizer, 32, 2, device="cpu")
assert fs.get_model_parallel_world_size() == 2 == first.model.layers[0].attention.wo.ranks
a, b = (g.generate([[1, 5], [1, 9, 30]], 6, temperature=0) for g in (first, second))
try:
    Llama.build(folder, tokenizer, 32, 2, model_parallel_size=1, device="cpu")
except DeviceError as e:
    print("refused:", "groups of 2" in str(e))
print(a == b, len(a[0][0]))
"""


@pytest.mark.parametrize("existing_groups", ["none", "default group", "model-parallel"])
def test_build_uses_process_groups_that_the_caller_created_and_works_twice(
    small: SimpleNamespace, tmp_path: Path, existing_groups: str
) -> None:
    script = tmp_path / "build_in_groups.py"
    script.write_text(BUILD_IN_GROUPS)
    done = torchrun(2, script, small.folder, small.tokenizer_path, existing_groups)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if not line.startswith("> initializing")]
    assert printed == ["refused: True", "True 6"]
    # Fairscale prints a message when groups are created. This library hides the message if it creates the groups itself.
    assert ("> initializing" in done.stdout) == (existing_groups == "model-parallel")


IMPORT_LLAMA = """
import os, sys
for name in sys.argv[1:]:
    os.environ.pop(name, None)
import torch
from torch.overrides import TorchFunctionMode

calls = []

class Record(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            calls.append(function)
        return result

before = dict(os.environ)
with Record():
    import llama
from llama.kernels import avx2, avx512, pack
print(dict(os.environ) == before, calls, [module.status.cache_info().currsize for module in (avx2, avx512, pack)])
"""


def test_importing_llama_sets_no_environment_variable_makes_no_tensor_and_loads_no_extension() -> None:
    done = run("-c", IMPORT_LLAMA, *ENVIRONMENT)
    assert done.stdout == "True [] [0, 0, 0]\n", done.stdout + done.stderr


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_build_sets_environment_variables_for_torch_and_onednn_unless_they_are_set(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ENVIRONMENT:
        monkeypatch.setenv(variable, "")  # lets monkeypatch restore the variable after the test, even if it was unset
        monkeypatch.delenv(variable)
    monkeypatch.setenv(name, "7")
    Llama.build(small.folder, small.tokenizer_path, 16, 1, device="cpu")
    assert os.environ[name] == "7"
    assert all(os.environ.get(variable, "").isdigit() for variable in ENVIRONMENT)


def test_build_without_process_groups_changes_nothing_but_the_seed_and_three_environment_variables(
    small: SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    """Check that `Llama.build` and generation create no process group, change no default of torch, and print nothing."""

    def state() -> tuple:
        return (
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.get_num_threads(), torch.distributed.is_initialized(), sys.stdout, sys.stderr,
            {name: value for name, value in os.environ.items() if name not in ENVIRONMENT},
        )  # fmt: skip

    before = state()
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", seed=5)
    random_values = torch.rand(3)
    llama.text_completion(["sea"], max_gen_len=4)
    assert state() == before
    assert tuple(capfd.readouterr()) == ("", "")
    assert torch.equal(random_values, torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_world_size_without_rank_is_ignored(small: SimpleNamespace, tmp_path: Path) -> None:
    """Set WORLD_SIZE without RANK, as some batch systems do for every job."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom llama import Llama\n"
        "llama = Llama.build(*sys.argv[1:], 32, 2, device='cpu')\n"
        "print(len(llama.generate([[1, 5]], 3)[0][0]))\n"
    )
    done = run(script, small.folder, small.tokenizer_path, WORLD_SIZE="2")
    assert done.stdout == "3\n", done.stderr


def test_one_process_opens_no_socket(small: SimpleNamespace, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom llama import Llama\n"
        "Llama.build(*sys.argv[1:], 32, 2, device='cpu').text_completion(['sea'], max_gen_len=2)\n"
        "fds = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')]\n"
        "print([fd for fd in fds if os.path.exists(fd) and 'socket' in os.readlink(fd)])\n"
    )
    done = run(script, small.folder, small.tokenizer_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "gpus, world, local_rank, device, want",
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
def test_each_rank_gets_a_device_of_its_own_or_an_error(
    monkeypatch: pytest.MonkeyPatch, gpus: int, world: int, local_rank: int | None, device: str | None, want: str
) -> None:
    """Pretend that the machine has `gpus` GPUs and runs all `world` ranks. `want` is the device of this rank, or part of an
    error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for key, value in (("LOCAL_WORLD_SIZE", world), ("LOCAL_RANK", local_rank)):
        if local_rank is None:
            monkeypatch.delenv(key, raising=False)
        else:
            monkeypatch.setenv(key, str(value))
    if " " in want:
        with pytest.raises(DeviceError, match=want):
            setup.choose_device(device, world)
    else:
        assert str(setup.choose_device(device, world)) == want


def test_mps_is_used_only_on_request_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert setup.choose_device(None) == torch.device("cpu")
    assert capsys.readouterr().err == ""
    assert setup.choose_device("mps") == setup.choose_device(torch.device("mps")) == torch.device("mps")
    assert capsys.readouterr().err.count("llama: device='mps' is untested") == 1


@pytest.mark.parametrize(
    "addresses, env, reachable",
    [
        (["127.0.1.1"], {}, False),
        (["127.0.1.1", "::1"], {}, False),
        ([], {}, False),
        (["127.0.0.1", "10.0.0.1"], {}, True),
        (["fe80::1%eth0"], {}, True),
        (["127.0.1.1"], {"GLOO_SOCKET_IFNAME": "eth0"}, True),
        (["127.0.1.1"], {"LOCAL_WORLD_SIZE": "4"}, True),  # all 4 ranks run on one machine
    ],
)
def test_a_host_name_without_an_address_that_other_machines_can_reach_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], env: dict[str, str], reachable: bool
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
    if reachable:
        groups.check_reachable()
    else:
        assert_raises(groups.check_reachable, DeviceError, "this machine's name, 'alpha'", "set GLOO_SOCKET_IFNAME")


def test_progress_is_shown_on_terminals_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.progress([1, 2, 3], lambda n: n * 10**9, "loading")) == [1, 2, 3]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.progress([1, 2, 3], lambda n: n * 10**9, "loading")) == [1, 2, 3]
    shown = capsys.readouterr().err.split("\r")
    assert shown[-1].startswith("loading [##############################] 6.0 of 6.0 GB")


def test_ranks_on_one_machine_share_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory.free_memory(torch.device("cpu"))
    assert free is not None and free.bytes > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    quarter = free_memory.free_memory(torch.device("cpu"))
    assert quarter is not None and quarter.bytes < free.bytes / 2


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are used on Linux only")
def test_tensors_in_huge_pages_are_aligned_and_next_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HugePageAllocator, "chunk_bytes", 4096)  # some of the tensors are larger than a chunk of 4096 bytes
    allocator, sources = HugePageAllocator(), [torch.randn(n, 3).bfloat16() for n in (5, 100, 1000, 7, 600)]
    with torch.inference_mode():
        copies = [allocator.empty(*source.shape, dtype=source.dtype).copy_(source) for source in sources]
    for source, copied in zip(sources, copies, strict=True):
        assert torch.equal(copied, source) and copied.is_contiguous() and copied.data_ptr() % 64 == 0
    assert copies[1].data_ptr() - copies[0].data_ptr() == 64
