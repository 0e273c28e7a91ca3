"""The benchmark scripts run on tiny models and print a result for every variant that they compare."""

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
    """Run a workload with several rows, and one with longer prompts than the context that the peer was first built with."""
    workloads = ["decode-4", "prefill-512"]
    args = ["--shape", "tiny", "--peers", "reference", "--dtype", "f32", "--runs", "1", "--workloads", ",".join(workloads)]
    printed = run("speed.py", *args, "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    peers = ["ours", "reference"]
    assert {(r["workload"], r["peer"]) for r in results["runs"]} == {(w, p) for w in workloads for p in peers}
    assert all(r["seconds"] > 0 for r in results["runs"])
    assert results["agreement"]["reference"]["first"] == 1
    assert all(name in printed for name in (*workloads, *peers))
    assert run("report.py", tmp_path / "results.json") == printed


@pytest.mark.parametrize(
    "script, args, rows",
    [
        ("batching.py", "--prompts 4 --rows 2 --runs 1 --shortest 2", ["static", "continuous"]),
        ("callers.py", "--callers 4 --rows 2 --new 2 --runs 1 --long 300", ["throughput", "first token", "longest gap"]),
        ("prefixes.py", "--scale 0.02", ["dialogs", "choices"]),
        ("speculate.py", "costs --runs 1", ["  plain", "  7 right guesses", "  wrong guesses", "  7 guesses: a step"]),
        ("turns.py", "--turns 2 --new 3 --runs 1", [" turn", "    1", "    2"]),
        ("load.py", "--runs 1", ["reference", "ours, 1 rank", "ours, 2 ranks"]),
        ("load.py", "--quantize int4", ["from the shards", "from the file"]),
        ("load.py", "--layouts --runs 1", ["Meta's", "Hugging Face's", "ratio"]),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(".py") else "",
)
def test_each_comparison_prints_a_line_per_variant(script: str, args: str, rows: list[str]) -> None:
    lines = run(script, "--shape", "tiny", *args.split()).splitlines()
    assert all(any(line.startswith(row) for line in lines) for row in rows), lines


def test_two_replicas_are_compared_with_one_replica_and_with_two_ranks(tmp_path: Path) -> None:
    sizes = "--prompts", 4, "--new", 4, "--rows", 2, "--runs", 1
    printed = run("replicas.py", "--shape", "tiny", *sizes, "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())["ids/s"]
    assert all(way in printed and min(rates) > 0 for way, rates in results.items())
    assert set(results) == {
        "1 replica, half the threads",
        "1 replica",
        "1 model on 2 ranks",
        "2 replicas",
        "2 replicas, rank 0 leads",
    }


def test_servers_are_measured_and_those_that_are_absent_are_named(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="the server needs the extra serve")
    sizes = "--clients", "1,2", "--requests", 1, "--prompt", 8, "--new", 4, "--rows", 2, "--runs", 1
    printed = run("serve.py", "--shape", "tiny", *sizes, "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["clients"] for r in results["runs"] if r["server"] == "ours"] == [1, 2]
    assert all(r["tokens/s"] > 0 and min(r["first"]) > 0 for r in results["runs"])
    assert {"ours"} <= set(results["agreement"]) and {"llama-server", "vllm"} <= {*results["agreement"], *results["absent"]}
    assert all(f"{name}: left out" in printed for name in results["absent"])
    assert all(label in printed for label in ("requests/s", "tokens/s", "first token, s", "95% of them within"))


@pytest.mark.skipif(not (avx512.extension() or avx2.extension()), reason="nothing is compiled here")
def test_compiled_kernels_are_compared_with_pytorch() -> None:
    """With the AVX-512 extension each line of a quantized model also has a result for the fused decode step."""
    printed = run("compiled.py", "--shape", "tiny", "--runs", 2, "--formats", "none,int8", "--rows", "1,3")
    head, *lines = printed.splitlines()[1:]
    assert all(way in head for way in ("fused", "layerwise", "PyTorch", "module"))
    assert {tuple(line.split()[:2]) for line in lines} == {(format, rows) for format in ("none", "int8") for rows in "13"}
    assert all("-" not in line.split() or line.startswith("none") or avx512.extension() is None for line in lines), lines


def test_quality_is_measured_for_every_format_and_falls_with_its_bits(tmp_path: Path, small: SimpleNamespace) -> None:
    (tmp_path / "text").write_text("Once upon a time there was a cat. " * 4)
    model = "--ckpt_dir", small.folder, "--tokenizer_path", small.tokenizer_path, "--text", tmp_path / "text"
    printed = run("quality.py", *model, "--json", tmp_path / "results.json")
    ways = json.loads((tmp_path / "results.json").read_text())["ways"]
    assert {"bfloat16", "int8", "int4"} < set(ways) and all(way in printed for way in ways)
    assert ways["bfloat16"]["kl"] < ways["int8"]["kl"] < ways["int4"]["kl"] < ways["int4, output layer in 4 bit"]["kl"]


def test_quality_scores_tokens_and_answers(tmp_path: Path, small: SimpleNamespace) -> None:
    dataset = {"texts": [[1, 40, 50, 60], [1, 70]], "questions": [[1, 40], [1, 50, 60]], "answers": [[41, 42, 43], [61]]}
    (tmp_path / "tokens.json").write_text(json.dumps(dataset))
    model = "--ckpt_dir", small.folder, "--tokenizer_path", small.tokenizer_path, "--tokens", tmp_path / "tokens.json"
    printed = run("quality.py", *model, "--json", tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["positions"] == 4 and results["answers"] == {"count": 2, "positions": 4}
    assert "4 positions" in printed and "2 answers" in printed
    assert all(0 <= way["answers"]["same"] <= 2 and 0 < way["answers"]["kl"] < 5 for way in results["ways"].values())
    assert results["ways"]["int4"]["weights"] < results["ways"]["int8"]["weights"] < results["ways"]["bfloat16"]["weights"]


def test_results_in_lm_evaluation_harness_equal_those_of_hf() -> None:
    for package in ("lm_eval", "transformers", "google.protobuf"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    printed = run("equal_to_hf.py", BENCHMARKS.parent / "demo/model", "--size", 0.03)
    lines = [line.rsplit(maxsplit=4) for line in printed.splitlines()]
    assert [line[0] for line in lines[1:]] == [
        "choices", "choices after 3 examples", "choices, too long", "choices in dialogs", "choices after 2 turns",
        "last words", "last words in dialogs", "whole texts", "answers", "answers in dialogs",
    ]  # fmt: skip
    assert all(
        int(requests) > 0 and float(difference) < 1e-3 and others == "0" for _, requests, difference, others, _ in lines[1:]
    )
