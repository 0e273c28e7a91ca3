"""Speed: this library beside what users would pick instead, on the same weights, in one run.

    python benchmarks/speed.py [--shape 1.1B|7B] [--runs 5] [--threads 2] [--peers transformers,openvino:int4,...]
        [--workloads prefill-512,decode-1,...] [--dtype bf16|f16|f32] [--device cpu|cuda] [--work FOLDER]
        [--ckpt FOLDER --tokenizer FILE] [--json FILE] [--plot FILE.svg]

The weights are random, in the shape of a known model, or those of --ckpt (one shard). Each peer has a process of its
own, and they take turns: workload by workload, run by run. Before each timing of steps the memory is read once by
itself, so that the share of its bandwidth is known under the same conditions. Where the models do not fit into memory
together, each is loaded anew for each run. Greedy throughout, and nothing ends a row.

    prefill-N       a prompt of N ids, until its first new id
    decode-B        32 steps of B rows after prompts of 8 ids, prompts not counted
    context-N       16 steps of one row after a prompt of N ids, prompt not counted
    ragged          prompts of 16, 64, 128 and 512 ids and 32 new ids each, all of it

Peers are transformers, llama.cpp, openvino (OpenVINO GenAI) and ctranslate2, the latter two on the CPU alone, and reference,
the reference's way of stepping. A peer may have a variant, as in llama.cpp:Q8_0, openvino:int4, ctranslate2:int8 or, on a GPU,
ours:int8+compile. `ours` goes first and need not be named.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import SHAPES, checkpoint, environment, fresh, peak_rss, tokenizer
from peers import Job, names
from report import plot, table

from llama import ModelArgs, Tokenizer
from llama.planning.estimate import cache_bytes
from llama.planning.free_memory import free_memory

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
WORKLOADS = "prefill-512,decode-1,decode-4,decode-8,ragged,context-128,context-1024,context-4000"
DEFAULT_PEERS = {"cpu": "transformers,llama.cpp", "cuda": "ours:compile,ours,transformers"}
ROOM = {"cpu": 1.3, "cuda": 1.1}  # memory a peer takes for each byte of weights; on a GPU there is a cache for all workloads
LEAST = {"cpu": 0.5, "cuda": 0.2}  # seconds that one measurement takes at least
CHECKED = range(9, 17)  # lengths of the prompts on which peers must agree
CHECKED_NEW = 16


@dataclass(frozen=True)
class Workload:
    name: str
    lengths: tuple[int, ...]
    new: int
    timed: str  # "prefill", "step" or "all"

    @staticmethod
    def parse(name: str) -> "Workload":
        kind, _, number = name.partition("-")
        if kind == "ragged":
            return Workload(name, (16, 64, 128, 512), 32, "all")
        if kind not in ("prefill", "decode", "context") or not number.isdecimal():
            raise SystemExit(f"{name!r} is no workload; see --help")
        n = int(number)
        return {
            "prefill": Workload(name, (n,), 1, "prefill"),
            "decode": Workload(name, (8,) * n, 33, "step"),
            "context": Workload(name, (n,), 17, "step"),
        }[kind]

    def prompts(self, vocab_size: int) -> list[list[int]]:
        draw = random.Random(0)
        return [[draw.randrange(3, vocab_size) for _ in range(n)] for n in self.lengths]

    def seconds(self, times: list[list[float]]) -> float:
        """Of a prefill, a step, or all, from the seconds until the first ids and from there to the last."""
        first, rest = (statistics.median(column) for column in zip(*times, strict=True))
        return {"prefill": first, "step": rest / max(1, self.new - 1), "all": first + rest}[self.timed]

    def ids(self) -> int | None:
        """How many are made or read in those seconds; None where the seconds themselves tell more."""
        return {"prefill": sum(self.lengths), "step": len(self.lengths), "all": None}[self.timed]


class Worker:
    """A peer's process, which waits on a pipe while the others are measured."""

    def __init__(self, job: Job) -> None:
        self.peer, self.log = job.peer, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peers.worker", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(job.threads),
        )
        loaded = self._read()
        self.load = {"seconds": loaded["seconds"], "peak": loaded["device_peak"] or peak_rss(self.process.pid)}

    def ask(self, prompts: list[list[int]], new: int, least: float) -> dict[str, Any]:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has died: _read says why
            self.process.stdin.write(json.dumps({"prompts": prompts, "new": new, "least": least}) + "\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.peer} ended with {self.process.wait()}:\n{self.log.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


class Bandwidth:
    """Bytes per second that a plain read of memory reaches, or on a GPU a plain copy: the median of 5, over 1 GB."""

    def __init__(self, device: str) -> None:
        self.data = torch.ones(250_000_000, device=device)
        self.copy = torch.empty_like(self.data) if device == "cuda" else None

    def __call__(self) -> float:
        return statistics.median(self._once() for _ in range(5))

    def _once(self) -> float:
        if self.copy is None:
            begun = time.perf_counter()
            self.data.sum()
            return self.data.nbytes / (time.perf_counter() - begun)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):  # of half a millisecond each: launching them must not count
            self.copy.copy_(self.data)
        torch.cuda.synchronize()
        return 10 * 2 * self.data.nbytes / (time.perf_counter() - begun)  # read and written


def measure(jobs: dict[str, Job], workloads: list[Workload], runs: int, vocab_size: int, together: bool) -> dict[str, Any]:
    """Every single measurement, and what was seen on the way: loading, and whether the peers agree."""
    device = next(iter(jobs.values())).device
    bandwidth, least = Bandwidth(device), LEAST[device]
    found: dict[str, Any] = {"load": {peer: [] for peer in jobs}, "agreement": {}, "runs": []}
    groups = [list(jobs)] if together else [[peer] for peer in jobs]
    workers: dict[str, Worker] = {}
    first_ids: dict[str, list[list[int]]] = {}
    try:
        for run, group in itertools.product(range(runs), groups):
            for peer in group:
                if peer not in workers:
                    workers[peer] = Worker(jobs[peer])
                    found["load"][peer].append(workers[peer].load)
                    first_ids[peer] = warm_up(workers[peer], workloads, vocab_size, jobs[peer].device)
                    found["agreement"][peer] = agreement(first_ids, peer)
            for workload, peer in itertools.product(workloads, group):
                read = bandwidth() if workload.timed == "step" else None
                times = workers[peer].ask(workload.prompts(vocab_size), workload.new, least)["times"]
                record = {"run": run, "workload": workload.name, "peer": peer, "seconds": workload.seconds(times)}
                found["runs"].append(record | {"bandwidth": read, "times": times})
                show(f"run {run + 1} of {runs}: {peer}, {workload.name}")
            if not together:
                workers.pop(group[0]).close()
    finally:
        show("")
        for worker in workers.values():
            worker.close()
    return found


def show(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{progress}\033[K", end="", file=sys.stderr, flush=True)


def warm_up(worker: Worker, workloads: list[Workload], vocab_size: int, device: str) -> list[list[int]]:
    """The ids on which peers must agree. On a GPU all workloads once, as kernels are compiled and captured for each shape."""
    if device == "cuda":
        for workload in workloads:
            worker.ask(workload.prompts(vocab_size), workload.new, least=0)
    prompts = Workload("check", tuple(CHECKED), CHECKED_NEW, "all").prompts(vocab_size)
    return worker.ask(prompts, CHECKED_NEW, least=0)["ids"]


def agreement(ids: dict[str, list[list[int]]], peer: str) -> dict[str, float]:
    """The share of rows whose first id is ours, and of all ids before the first difference.

    Rounding turns near ties, of which random weights have many, and fewer bits turn more; but if most of the first ids
    differ without any quantization, these are not the same weights.
    """
    ours, same = next(iter(ids.values())), []
    for mine, theirs in zip(ours, ids[peer], strict=True):
        equal = (a == b for a, b in zip(mine, theirs, strict=True))
        same.append(sum(itertools.takewhile(bool, equal)))
    first = statistics.mean(n > 0 for n in same)
    if first < 0.5 and not re.search(":(Q|int)", peer):
        raise SystemExit(f"{peer}: only {first:.0%} of its first ids are ours: the weights were not converted right")
    return {"first": first, "all": sum(same) / (len(same) * CHECKED_NEW)}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "llama-cpp-python", "openvino-genai", "ctranslate2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--ckpt", type=Path, help="measure this checkpoint, instead of random weights")
    parser.add_argument("--tokenizer", type=Path, help="of --ckpt")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", help="default: " + "; on ".join(f"{d}: {p}" for d, p in DEFAULT_PEERS.items()))
    parser.add_argument("--workloads", default=WORKLOADS)
    parser.add_argument("--dtype", choices=DTYPES, help="default: the stored one")
    parser.add_argument("--device", default="cpu", choices=DEFAULT_PEERS)
    parser.add_argument("--work", type=Path, help="where to keep checkpoints (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG file")
    a = parser.parse_args()
    if bool(a.ckpt) != bool(a.tokenizer):
        parser.error("--ckpt and --tokenizer go together")
    peers = (a.peers or DEFAULT_PEERS[a.device]).split(",")
    a.peers = peers if peers[0].startswith("ours") else ["ours", *peers]
    for name in a.peers:
        if name not in names(a.device):
            parser.error(f"{name!r} is no peer on {a.device}; there are {', '.join(names(a.device))}")
    a.workloads = [Workload.parse(name) for name in a.workloads.split(",")]
    return a


def main() -> None:
    a = parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        ckpt, tokenizer_path = (a.ckpt, a.tokenizer) if a.ckpt else (checkpoint(work, a.shape), tokenizer(work))
        stored = torch.load(ckpt / "consolidated.00.pth", map_location="cpu", weights_only=True, mmap=True)
        dtype = DTYPES[a.dtype] if a.dtype else str(stored["tok_embeddings.weight"].dtype).removeprefix("torch.")
        size = sum(w.numel() for w in stored.values()) * getattr(torch, dtype).itemsize
        rows = max(len(w.lengths) for w in a.workloads)
        window = max(max(CHECKED) + CHECKED_NEW, *(max(w.lengths) + w.new for w in a.workloads))
        common = (str(ckpt), str(tokenizer_path), str(work / ckpt.name), dtype, a.device, a.threads, rows, window)
        jobs = {peer: Job(peer, *common) for peer in a.peers}
        step_bytes = {
            peer: fresh("-m", "peers.convert", json.dumps(asdict(job)), threads=a.threads)[0]["bytes"]
            for peer, job in jobs.items()
        }
        free, vocab_size = free_memory(torch.device(a.device)), Tokenizer(tokenizer_path).n_words
        cache = dict(max_batch_size=rows, max_seq_len=window, vocab_size=vocab_size)
        args = ModelArgs(**json.loads((ckpt / "params.json").read_text()) | cache)
        each = ROOM[a.device] * size + (cache_bytes(args, 1, getattr(torch, dtype)) if a.device == "cuda" else 0)
        together = free is None or each * len(jobs) < free
        found = measure(jobs, a.workloads, a.runs, vocab_size, together)

    results = {
        "model": ckpt.name,
        "dtype": dtype,
        "bytes": size,
        "step_bytes": step_bytes,
        "device": a.device,
        "machine": machine(a.device),
        "threads": a.threads,
        "versions": versions(),
        "workloads": [{"name": w.name, "timed": w.timed, "ids": w.ids()} for w in a.workloads],
        **found,
    }
    print("\n".join(table(results)))
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(results, indent=1))
    if a.plot:
        plot(results, a.plot)


if __name__ == "__main__":
    main()
