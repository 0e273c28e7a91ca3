"""The benchmark of speed, on a model that measures nothing: that it runs, and that what it compares is comparable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def test_speed_measures_each_workload_with_each_peer(tmp_path: Path) -> None:
    """Prompts longer than the window that a peer was loaded with, several rows."""
    workloads = ["decode-4", "prefill-512"]
    args = ["--shape", "tiny", "--peers", "reference", "--dtype", "f32", "--runs", "1", "--workloads", ",".join(workloads)]
    command = [sys.executable, BENCHMARKS / "speed.py", *args, "--json", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    peers = ["ours", "reference"]
    assert {(r["workload"], r["peer"]) for r in found["runs"]} == {(w, p) for w in workloads for p in peers}
    assert all(r["seconds"] > 0 for r in found["runs"])
    assert found["agreement"]["reference"]["first"] == 1
    assert all(name in done.stdout for name in (*workloads, *peers))


def test_peers_get_the_environment_that_was_given() -> None:
    """This library sets variables when it is imported, which would make a peer faster or slower than its users see it."""
    ours = {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "THP_MEM_ALLOC_ENABLE"}
    given = {name: value for name, value in os.environ.items() if name not in ours}
    path = f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent}"
    code = "import common, os; print(*sorted(set(os.environ) - set(common.environment(2))))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=given | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert set(done.stdout.split()) >= ours, done.stderr
