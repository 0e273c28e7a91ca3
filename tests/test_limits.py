"""The memory check and the number of threads obey the limits of cgroups of both versions, and of ulimit."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama, info
from llama.checkpoint import loading, shards, validate
from llama.distributed import cgroups, threads
from llama.kernels.packed_weight import PackedWeight
from llama.planning import free_memory

from .support import run

V1_WITHOUT_LIMIT = 9223372036854771712
V2_MOUNT = "31 23 0:28 {mounted} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
V1_MOUNTS = (
    "32 31 0:29 {mounted} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
)
STAT = "anon 5\nfile 950\nshmem 250\ninactive_file 300\nactive_file 400\nslab_reclaimable 7\n"  # 707 can be freed
STAT_V1 = "cache 0\ninactive_file 1\nactive_file 1\ntotal_shmem 250\ntotal_inactive_file 300\ntotal_active_file 400\n"  # 700


def write_tree(root: Path, cgroup: str, mountinfo: str, files: dict[str, object]) -> Path:
    """Write a tree as Linux shows it to a process: its cgroups, its mounts, and the files of cgroups in /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo}.items() | {
        (f"sys/fs/cgroup/{name}", str(text)) for name, text in files.items()
    }:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(folder: str, limit: object, used: object, stat: str = STAT) -> dict[str, object]:
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def v1(folder: str, limit: object, used: object, stat: str = STAT_V1) -> dict[str, object]:
    folder = f"memory/{folder}memory."
    return {f"{folder}limit_in_bytes": limit, f"{folder}usage_in_bytes": used, f"{folder}stat": stat}


@pytest.mark.parametrize(
    "cgroup, mounts, files, want",
    [
        # A container with a cgroup namespace of its own sees its cgroup as the root.
        ("0::/", V2_MOUNT, v2("", 10_000, 9_000), (1707, "memory.max")),
        # Slurm and systemd-run nest cgroups: the least limit of all of them applies.
        ("0::/a/b", V2_MOUNT, v2("a/b/", 10_000, 2_000) | v2("a/", 5_000, 4_000), (1707, "a/memory.max")),
        ("0::/a/b", V2_MOUNT, v2("a/b/", 5_000, 4_000) | v2("a/", "max", 4_000), (1707, "a/b/memory.max")),
        ("0::/a", V2_MOUNT, v2("a/", "max", 4_000) | {"a/memory.high": 4_500}, (1207, "a/memory.high")),
        # A threaded cgroup has no memory files; a deleted cgroup has none at all.
        ("0::/a/b/threaded", V2_MOUNT, v2("a/b/", 5_000, 4_000), (1707, "a/b/memory.max")),
        ("0::/a (deleted)", V2_MOUNT, v2("", 5_000, 4_000), (1707, "memory.max")),
        # A container without a cgroup namespace: its path is that of the host, but only its own cgroup is mounted.
        ("0::/docker/f00", V2_MOUNT.replace("{mounted}", "/docker/f00"), v2("", 5_000, 4_000), (1707, "memory.max")),
        ("0::/docker/f00/x", V2_MOUNT.replace("{mounted}", "/docker/f00"), v2("x/", 5_000, 4_000), (1707, "x/memory.max")),
        # A cgroup namespace without a mount of its own: the names of the cgroups above it are hidden.
        ("0::/", V2_MOUNT.replace("{mounted}", "/../.."), v2("", 5_000, 4_000), (1707, "memory.max")),
        (
            "0::/x",
            V2_MOUNT.replace("{mounted}", "/../.."),
            v2("a/b/", 5_000, 4_000)
            | v2("a/c/x/", 1, 0)
            | {"a/b/x/cgroup.procs": f"1\n{os.getpid()}\n", "a/c/x/cgroup.procs": 2},
            (1707, "a/b/memory.max"),
        ),
        ("0::/../other", V2_MOUNT, v2("", 5_000, 4_000), (1707, "memory.max")),
        ("0::/a b", V2_MOUNT.replace("{mounted}", r"/a\040b"), v2("", 5_000, 4_000), (1707, "memory.max")),
        ("4:memory:/\n0::/", V1_MOUNTS, v1("", 10_000, 9_000), (1700, "memory/memory.limit_in_bytes")),
        (
            "4:memory:/slurm/job_7\n1:cpu,cpuacct:/\n0::/",
            V1_MOUNTS,
            v1("slurm/job_7/", V1_WITHOUT_LIMIT, 100) | v1("slurm/", 5_000, 4_000) | v1("", V1_WITHOUT_LIMIT, 9_000),
            (1700, "memory/slurm/memory.limit_in_bytes"),
        ),
        (
            "4:memory:/docker/f00",
            V1_MOUNTS.replace("{mounted}", "/docker/f00"),
            v1("", 5_000, 4_000),
            (1700, "memory/memory.limit_in_bytes"),
        ),
        # Pages of tmpfs cannot be freed. Usage beyond the limit leaves nothing, and never more than the limit is free.
        ("0::/", V2_MOUNT, v2("", 5_000, 4_000, "file 4000\nshmem 4000\n"), (1000, "memory.max")),
        ("0::/", V2_MOUNT, v2("", 5_000, 9_000), (0, "memory.max")),
        ("0::/", V2_MOUNT, v2("", 5_000, 10), (5_000, "memory.max")),
        # No limit.
        ("0::/a", V2_MOUNT, v2("a/", "max", 4_000), None),
        ("4:memory:/a\n0::/", V1_MOUNTS, v1("a/", V1_WITHOUT_LIMIT, 100), None),
        ("0::/", "", v2("", 5_000, 4_000), None),
        ("", V2_MOUNT, v2("", 5_000, 4_000), None),
        # Unreadable numbers: what can be read still counts.
        ("0::/", V2_MOUNT, v2("", "lots", 4_000), None),
        ("0::/", V2_MOUNT, v2("", "", 4_000), None),
        ("0::/", V2_MOUNT, v2("", 5_000, "?", "a b c\n\nanon ?"), (5_000, "memory.max")),
        ("zero\n::\n0:x\n\n0::/", "a - cgroup2\n\n - \nx - y z\n" + V2_MOUNT, v2("", 5_000, 4_000), (1707, "memory.max")),
        ("0::a", V2_MOUNT, v2("", 5_000, 4_000), None),
    ],
)
def test_the_least_memory_limit_of_a_cgroup_and_its_ancestors_applies_and_file_pages_count_as_free(
    tmp_path: Path, cgroup: str, mounts: str, files: dict[str, object], want: tuple[int, str] | None
) -> None:
    root = write_tree(tmp_path, cgroup, mounts.replace("{mounted}", "/"), files)
    found = cgroups.free_memory(root)
    assert (found and (found.value, str(found.file.relative_to(root / "sys/fs/cgroup")))) == want


@pytest.mark.parametrize(
    "cgroup, mounts, files, want",
    [
        ("0::/", V2_MOUNT, {"cpu.max": "150000 100000"}, (1.5, "cpu.max")),
        ("0::/a/b", V2_MOUNT, {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, (0.5, "a/cpu.max")),
        ("0::/a", V2_MOUNT, {"a/cpu.max": "max 100000"}, None),
        ("0::/a", V2_MOUNT, {"a/cpu.max": "many"}, None),
        ("0::/a", V2_MOUNT, {"a/cpu.max": "5 0"}, None),
        (
            "1:cpu,cpuacct:/a",
            V1_MOUNTS,
            {"cpu,cpuacct/a/cpu.cfs_quota_us": 300_000, "cpu,cpuacct/a/cpu.cfs_period_us": 100_000},
            (3, "cpu,cpuacct/a/cpu.cfs_quota_us"),
        ),
        (
            "1:cpu,cpuacct:/a",
            V1_MOUNTS,
            {"cpu,cpuacct/a/cpu.cfs_quota_us": -1, "cpu,cpuacct/a/cpu.cfs_period_us": 100_000},
            None,
        ),
    ],
)
def test_the_least_cpu_quota_of_a_cgroup_and_its_ancestors_applies(
    tmp_path: Path, cgroup: str, mounts: str, files: dict[str, object], want: tuple[float, str] | None
) -> None:
    root = write_tree(tmp_path, cgroup, mounts.replace("{mounted}", "/"), files)
    found = cgroups.cpu_quota(root)
    assert (found and (found.value, str(found.file.relative_to(root / "sys/fs/cgroup")))) == want


def test_a_cgroups_limit_is_divided_among_the_ranks_of_the_machine_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "free_memory", lambda: cgroups.Limit(1000, Path("/sys/fs/cgroup/job/memory.max")))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    free = free_memory.free_memory(torch.device("cpu"), mapped=100)
    assert free == (250, 250, "the cgroup's limit in /sys/fs/cgroup/job/memory.max")


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Pretend that this machine has 8 cores, of which a cgroup allows the time of 2.5."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cgroups, "cpu_quota", lambda *_: cgroups.Limit(2.5, Path("/sys/fs/cgroup/job/cpu.max")))
    torch.set_num_threads(8)
    threads.limit_threads.cache_clear()
    yield monkeypatch
    torch.set_num_threads(before)


def test_build_uses_no_more_threads_than_the_cpu_quota_says_so_and_leaves_later_changes(
    small: SimpleNamespace, eight_cores: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cpu, 3 threads" in info() and "2.5 core(s), by /sys/fs/cgroup/job/cpu.max" in info()
    assert torch.get_num_threads() == 8  # `info` changes nothing
    Llama.build(small.folder, small.tokenizer_path, 16, 1, device="cpu")
    assert torch.get_num_threads() == 3
    line = capsys.readouterr().err
    assert line.startswith("llama: 3 thread(s) instead of 8: /sys/fs/cgroup/job/cpu.max allows 2.5 CPU core(s)")
    assert line.count("\n") == 1 and "OMP_NUM_THREADS" in line
    torch.set_num_threads(8)
    Llama.build(small.folder, small.tokenizer_path, 16, 1, device="cpu")
    assert torch.get_num_threads() == 8 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "env, n_threads, want",
    [
        ({}, 8, 3),
        ({"LOCAL_WORLD_SIZE": "2"}, 8, 2),
        ({"LOCAL_WORLD_SIZE": "8"}, 8, 1),
        ({"OMP_NUM_THREADS": "8"}, 8, 8),
        ({"MKL_NUM_THREADS": "8"}, 8, 8),
        ({}, 7, 7),  # the caller has called torch.set_num_threads(7)
        ({}, 2, 2),
    ],
)
def test_the_cpu_quota_is_divided_among_ranks_and_a_number_chosen_by_the_user_is_kept(
    eight_cores: pytest.MonkeyPatch, env: dict[str, str], n_threads: int, want: int
) -> None:
    for name, value in env.items():
        eight_cores.setenv(name, value)
    torch.set_num_threads(n_threads)
    assert threads.allowed_threads()[0] == want


@pytest.mark.parametrize("dtype, format", [("float32", None), ("bfloat16", None), ("float32", "int8")])
@pytest.mark.parametrize("packs", [True, False])
def test_the_bytes_of_weights_that_stay_mapped_are_those_of_the_loaded_model(
    small: SimpleNamespace, dtype: str, format: str | None, packs: bool
) -> None:
    files = shards.open_shards(small.folder)
    model = validate.build_on_meta(small.params, files, 16, 1, 384)
    arguments = getattr(torch, dtype), torch.device("cpu"), format, packs
    estimated = loading.bytes_staying_mapped(model, files, *arguments)
    loading.load_weights(model, files, *arguments)
    mapped = {tensor.untyped_storage().data_ptr() for tensor in files.first.values()}
    weights = [p.data for p in model.parameters() if not isinstance(p.data, PackedWeight)]
    assert estimated == sum(weight.nbytes for weight in weights if weight.untyped_storage().data_ptr() in mapped)
    assert (estimated > 0) == (dtype == "float32")


BUILD_UNDER_ULIMIT = """
import resource, sys
import torch
from llama import CheckpointError, DeviceError, Llama

small, large, tokenizer = sys.argv[1:]
for limit, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
    for folder, free, max_seq_len in ((small, 500, 8192), (small, 500, 64), (large, 30, 64)):
        used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
        resource.setrlimit(limit, ((used << 10) + (free << 20), resource.RLIM_INFINITY))
        try:
            print(Llama.build(folder, tokenizer, max_seq_len, 64, device="cpu").text_completion(["sea"], max_gen_len=2) != [])
        except (CheckpointError, DeviceError) as e:
            print(e)
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux limits the address space of a process")
def test_a_checkpoint_that_does_not_fit_within_ulimit_is_refused_and_one_that_fits_runs(
    small: SimpleNamespace, tmp_path: Path
) -> None:
    torch.save({"norm.weight": torch.zeros(1 << 24)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_bytes((small.folder / "params.json").read_bytes())
    done = run("-c", BUILD_UNDER_ULIMIT, small.folder, tmp_path, small.tokenizer_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for (refused, built, unmapped), command in zip((lines[:3], lines[3:]), ("ulimit -v", "ulimit -d"), strict=True):
        assert "the model does not fit on cpu" in refused and f"are free within {command}. " in refused
        assert built == "True"
        assert unmapped.startswith(f"{tmp_path}/consolidated.00.pth: cannot be read: Cannot allocate memory; raise `ulimit -v`")
