"""The benchmarks, on models that measure nothing: that they run, and that what they compare is comparable."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama.kernels import avx2, avx512

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def run(script: str, *args: object) -> str:
    command = [sys.executable, BENCHMARKS / script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_speed_measures_each_workload_with_each_peer(tmp_path: Path) -> None:
    """Prompts longer than the window that a peer was loaded with, several rows."""
    workloads = ["decode-4", "prefill-512"]
    args = ["--shape", "tiny", "--peers", "reference", "--dtype", "f32", "--runs", "1", "--workloads", ",".join(workloads)]
    printed = run("speed.py", *args, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    peers = ["ours", "reference"]
    assert {(r["workload"], r["peer"]) for r in found["runs"]} == {(w, p) for w in workloads for p in peers}
    assert all(r["seconds"] > 0 for r in found["runs"])
    assert found["agreement"]["reference"]["first"] == 1
    assert all(name in printed for name in (*workloads, *peers))
    assert run("report.py", tmp_path / "found.json") == printed


@pytest.mark.parametrize(
    "script, args, rows",
    [
        ("batching.py", "--prompts 4 --rows 2 --runs 1 --shortest 2", ["waves", "continuous"]),
        ("turns.py", "--turns 2 --new 3 --runs 1", [" turn", "    1", "    2"]),
        ("load.py", "--runs 1", ["the reference's way", "ours, 1 rank", "ours, 2 ranks"]),
        ("load.py", "--quantize int4", ["from the shards", "from the file"]),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(".py") else "",
)
def test_others_print_what_they_compare(script: str, args: str, rows: list[str]) -> None:
    lines = run(script, "--shape", "tiny", *args.split()).splitlines()
    assert all(any(line.startswith(row) for line in lines) for row in rows), lines


def test_replicas_are_compared_with_one(tmp_path: Path) -> None:
    sizes = "--prompts", 4, "--new", 4, "--rows", 2, "--runs", 1
    printed = run("replicas.py", "--shape", "tiny", *sizes, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["ids/s"]
    assert all(way in printed and min(rates) > 0 for way, rates in found.items())
    assert set(found) == {"1 replica, half the threads", "1 replica", "1 model on 2 ranks", "2 replicas"}


@pytest.mark.skipif(not (avx512.extension() or avx2.extension()), reason="nothing is compiled here")
def test_compiled_code_beside_none() -> None:
    """And, with native.c, a step in one call: a line has a figure for each, where the weights are large enough or quantized."""
    printed = run("compiled.py", "--shape", "tiny", "--runs", 2, "--kinds", "none,int8", "--rows", "1,3")
    head, *lines = printed.splitlines()[1:]
    assert all(way in head for way in ("one call", "layers", "plain", "module"))
    assert {tuple(line.split()[:2]) for line in lines} == {(kind, rows) for kind in ("none", "int8") for rows in "13"}
    assert all("-" not in line.split() or line.startswith("none") or avx512.extension() is None for line in lines), lines


def test_quality_has_a_line_for_each_way(tmp_path: Path, small: SimpleNamespace) -> None:
    (tmp_path / "text").write_text("Once upon a time there was a cat. " * 4)
    model = "--ckpt_dir", small.folder, "--tokenizer_path", small.tokenizer_path, "--text", tmp_path / "text"
    printed = run("quality.py", *model, "--json", tmp_path / "found.json")
    ways = json.loads((tmp_path / "found.json").read_text())["ways"]
    assert {"bfloat16", "int8", "int4"} < set(ways) and all(way in printed for way in ways)
    assert ways["bfloat16"]["kl"] < ways["int8"]["kl"] < ways["int4"]["kl"] < ways["int4, output layer in 4 bit"]["kl"]


def test_quality_scores_tokens_and_answers(tmp_path: Path, small: SimpleNamespace) -> None:
    given = {"texts": [[1, 40, 50, 60], [1, 70]], "questions": [[1, 40], [1, 50, 60]], "answers": [[41, 42, 43], [61]]}
    (tmp_path / "ids.json").write_text(json.dumps(given))
    model = "--ckpt_dir", small.folder, "--tokenizer_path", small.tokenizer_path, "--ids", tmp_path / "ids.json"
    printed = run("quality.py", *model, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["positions"] == 4 and found["answers"] == {"count": 2, "positions": 4}
    assert "4 positions" in printed and "2 answers" in printed
    assert all(0 <= way["answers"]["same"] <= 2 and 0 < way["answers"]["kl"] < 5 for way in found["ways"].values())
    assert found["ways"]["int4"]["weights"] < found["ways"]["int8"]["weights"] < found["ways"]["bfloat16"]["weights"]
