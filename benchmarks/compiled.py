"""Decode steps with what setup.py compiled from C and without it, in turns in one process, on the same random weights.

    python benchmarks/compiled.py [--shape 1.1B] [--kinds none,int8,int4] [--rows 1,4] [--runs 12] [--threads 2] [--work FOLDER]

Each run reads memory plainly, and takes two steps of both, of which the faster counts. Runs are told apart by the rate of the
plain read, which in virtual machines may move within minutes: medians are of those below and above the middle of what was seen.
As on a CPU with AVX2 alone: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/compiled.py
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from common import SHAPES, checkpoint, tokenizer

from llama import Llama, avx2, native
from llama.cache import Batch
from llama.host import Hidden, host_step

READ = 500_000_000  # bytes


def without() -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(native, "COMPILED", None))
    stack.enter_context(mock.patch.object(avx2, "LIBRARY", None))
    return stack


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {"with": contextlib.nullcontext, "without": without}


def seconds(do: Callable[[], object]) -> float:
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


def step(llama: Llama, hidden: Hidden, ids: torch.Tensor, at: int) -> torch.Tensor:
    return llama.model.logits(hidden(ids, Batch.of([(row, at, 1) for row in range(len(ids))])))


def runs(models: dict[str, Llama], rows: int, n: int) -> Iterator[dict[str, float]]:
    """The plain read's rate, bytes per second, and what a step takes, seconds."""
    memory, ids, steps = torch.ones(READ // 4), torch.full((rows,), 5), {}
    for way, entered in WAYS.items():
        with entered():
            steps[way] = host_step(models[way].model, rows)
    for run in range(n):
        found = {"read": READ / seconds(memory.sum)}
        for way, entered in WAYS.items():
            with entered():
                positions = (20 + 2 * run % 200, 21 + 2 * run % 200)
                found[way] = min(seconds(functools.partial(step, models[way], steps[way], ids, at)) for at in positions)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--kinds", default="none,int8,int4")
    parser.add_argument("--rows", default="1,4")
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint (default: a temporary folder)")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        work = a.work or Path(temporary)
        folder, vocabulary = checkpoint(work, a.shape), tokenizer(work)
        print(f"{'weights':8}{'rows':>5}{'runs':>6}{'read, GB/s':>12}{'with, ms':>10}{'without':>10}{'ratio':>8}")
        for kind in a.kinds.split(","):
            models, quantize = {}, None if kind == "none" else kind
            for way, entered in WAYS.items():
                with entered():
                    models[way] = Llama.build(folder, vocabulary, 256, 16, device="cpu", quantize=quantize)
            for rows in map(int, a.rows.split(",")):
                found = list(runs(models, rows, a.runs))
                rates = [run["read"] for run in found]
                middle = (min(rates) + max(rates)) / 2 if max(rates) > 1.3 * min(rates) else 0  # else there is one mode
                for these in ([r for r in found if r["read"] < middle], [r for r in found if r["read"] >= middle]):
                    if these:
                        read, took, other = (statistics.median(r[name] for r in these) for name in ("read", "with", "without"))
                        ratio = statistics.median(r["without"] / r["with"] for r in these)
                        figures = f"{read / 1e9:12.0f}{took * 1e3:10.1f}{other * 1e3:10.1f}{ratio:7.2f}x"
                        print(f"{kind:8}{rows:5}{len(these):6}{figures}", flush=True)


if __name__ == "__main__":
    main()
