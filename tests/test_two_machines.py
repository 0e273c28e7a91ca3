"""Test two ranks on each of two machines. The machines are network namespaces that are joined by a virtual cable. Creating them
needs root."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .jobs import Job
from .support import random_weights, write_shards
from .test_ranks import SEVENTY_B, assert_same_answers

HERE = Path(__file__).parent
ADDRESSES = "10.77.0.1", "10.77.0.2"
# This script runs a worker on a rank. It prints the GPU that the rank would use if its machine had two GPUs, and the part of
# the model that the rank has.
PRINT_PLACEMENT = """
import os, runpy, sys, torch
from llama.distributed import groups, setup
originals = torch.cuda.is_available, torch.cuda.device_count
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
device = setup.choose_device("cuda", 4)
torch.cuda.is_available, torch.cuda.device_count = originals
runpy.run_path(sys.argv.pop(1), run_name="__main__")
sys.stderr.write(f"rank {os.environ['RANK']}: {device}, part {groups.model_parallel()}\\n")
"""


def ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Create two connected network namespaces and return their names. The network device in each namespace has the name of the
    namespace."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs Linux, root and ip")
    names = [f"m{os.getpid()}{side}" for side in "ab"]
    with ExitStack() as cleanup:
        try:
            for name in names:
                ip("netns", "add", name)
                cleanup.callback(ip, "netns", "del", name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                for device in ("lo", name):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces cannot be created here: {e.stderr.decode().strip()}")
        yield names


def start(machines: list[str], folder: Path, *command: object) -> list[Job]:
    """Start torchrun on both machines. Pass explicit addresses, because the host names of the machines do not resolve."""
    jobs = []
    for i, (name, address) in enumerate(zip(machines, ADDRESSES, strict=True)):
        torchrun = "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 2, "--rdzv_backend", "c10d"
        rendezvous = "--rdzv_endpoint", f"{ADDRESSES[0]}:29400", "--rdzv_conf", f"is_host={i == 0}", "--local_addr", address
        in_namespace = "ip", "netns", "exec", name, sys.executable
        jobs.append(Job(folder, *torchrun, *rendezvous, *command, before=in_namespace, GLOO_SOCKET_IFNAME=name))
    return jobs


def test_four_ranks_on_two_machines_give_the_answers_of_one_rank(
    machines: list[str], tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, hidden = SEVENTY_B
    folder = write_shards(tmp_path / "model", params, random_weights(params, 384, hidden), 4)
    (tmp_path / "placement.py").write_text(PRINT_PLACEMENT)
    worker = HERE / "rank_worker.py"
    command = tmp_path / "placement.py", worker, tmp_path / "four.pt", tokenizer_path, folder
    with ExitStack() as stack:
        jobs = [stack.enter_context(job) for job in start(machines, tmp_path, *command)]
        for i, job in enumerate(jobs):
            job.ends(90)
            assert job.process.returncode == 0, job.stderr
            placements = sorted(re.findall(r"^rank .*", job.stderr, re.MULTILINE))
            assert placements == [f"rank {2 * i + k}: cuda:{k}, part ({2 * i + k}, 4)" for k in (0, 1)]
        assert [job.stdout for job in jobs] == ["only rank 0 is heard\n", ""]
    monkeypatch.setattr(sys, "argv", [str(worker), str(tmp_path / "one.pt"), str(tokenizer_path), str(folder)])
    runpy.run_path(str(worker), run_name="__main__")
    assert_same_answers(torch.load(tmp_path / "four.pt")[str(folder)], torch.load(tmp_path / "one.pt")[str(folder)])


def test_a_rank_killed_on_the_second_machine_ends_the_ranks_of_both_machines(
    machines: list[str], small: SimpleNamespace, tmp_path: Path
) -> None:
    doomed = write_shards(tmp_path / "doomed", small.params, small.weights)
    command = HERE / "fault_worker.py", 3, small.folder, small.tokenizer_path, doomed, "kill@decode"
    with ExitStack() as stack:
        first, second = (stack.enter_context(job) for job in start(machines, tmp_path, *command))
        second.sees("now: kill@decode")
        seconds = second.ends(), first.ends()
        print("rank 3 killed: the second machine ended after {:.1f} s, the first {:.1f} s later".format(*seconds))
        assert first.process.returncode and second.process.returncode
        assert "Signal 9 (SIGKILL) received by PID" in second.stderr
        assert first.stdout and not second.stdout
