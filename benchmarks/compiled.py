"""Decode steps, each way that there is on a CPU, in turns in one process, on the same random weights.

    python benchmarks/compiled.py [--shape 1.1B] [--kinds none,int8,int4] [--rows 1,4] [--runs 12] [--threads 2] [--work FOLDER]

    one call    all layers in one call of native.c, where it takes the model
    layers      the engine layer by layer, with what setup.py compiled from C
    plain       the engine without it, as LLAMA_COMPILED=0 has it
    module      `Transformer.forward` over the weights of the first two, which a model takes that a caller has changed

Each run reads memory plainly, and takes two steps of each, of which the faster counts. Runs are told apart by the rate of the
plain read, which in virtual machines may move within minutes: medians are of those below and above the middle of what was seen.
The ratio is that of plain steps to the fastest. As on a CPU with AVX2 alone: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
python benchmarks/compiled.py
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

from llama import Llama
from llama.backends import cpu
from llama.engine.forward import EngineForward
from llama.engine.kv_cache import RaggedBatch
from llama.kernels import avx2, avx512, c_extension, pack

READ = 500_000_000  # bytes
WAYS = "one call", "layers", "plain", "module"
Step = Callable[[torch.Tensor, int], torch.Tensor]  # tokens (B,), and where all of them stand -> logits


def without() -> contextlib.ExitStack:
    """As where nothing was compiled: models that are built meanwhile, and their steps."""
    stack = contextlib.ExitStack()
    for module, name in ((avx512, "status"), (avx2, "status"), (pack, "status")):
        stack.enter_context(mock.patch.object(module, name, lambda: c_extension.ExtensionStatus(None)))
    return stack


def seconds(do: Callable[[], object]) -> float:
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


def of_engine(forward: EngineForward, hidden: Callable[[torch.Tensor, RaggedBatch], torch.Tensor]) -> Step:
    def step(tokens: torch.Tensor, at: int) -> torch.Tensor:
        return forward.logits(hidden(tokens, RaggedBatch.from_segments([(row, at, 1) for row in range(len(tokens))])))

    return step


def steps_of(compiled: Llama, plain: Llama, rows: int) -> dict[str, Step]:
    """A step of so many rows, by the name of its way."""
    forward, other = compiled.engine.forward(), plain.engine.forward()
    steps = {"layers": of_engine(forward, forward.hidden), "plain": of_engine(other, other.hidden)}
    if cpu.why_unsupported(forward) is None:
        steps["one call"] = of_engine(forward, cpu.FusedDecodeStep(forward, rows))
    steps["module"] = lambda tokens, at: compiled.model.forward(tokens.unsqueeze(1), at)
    return steps


def runs(steps: dict[str, Step], rows: int, n: int) -> Iterator[dict[str, float]]:
    """The plain read's rate, bytes per second, and what a step takes, seconds."""
    memory, tokens = torch.ones(READ // 4), torch.full((rows,), 5)
    for run in range(n):
        found = {"read": READ / seconds(memory.sum)}
        for way, step in steps.items():
            with without() if way == "plain" else contextlib.nullcontext():
                positions = (20 + 2 * run % 200, 21 + 2 * run % 200)
                found[way] = min(seconds(functools.partial(step, tokens, at)) for at in positions)
        yield found


def line(kind: str, rows: int, these: list[dict[str, float]]) -> str:
    """The medians of some runs."""
    medians = {name: statistics.median(run[name] for run in these) for name in these[0]}
    ratio = statistics.median(run["plain"] / min(run[way] for way in WAYS if way in run) for run in these)
    columns = [f"{medians[way] * 1e3:10.1f}" if way in medians else f"{'-':>10}" for way in WAYS]
    return f"{kind:8}{rows:5}{len(these):6}{medians['read'] / 1e9:12.0f}{''.join(columns)}{ratio:7.2f}x"


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
        print("steps in ms")
        print(f"{'weights':8}{'rows':>5}{'runs':>6}{'read, GB/s':>12}{''.join(f'{way:>10}' for way in WAYS)}{'ratio':>8}")
        for kind in a.kinds.split(","):
            build = functools.partial(Llama.build, folder, vocabulary, 256, 16, device="cpu")
            compiled = build(quantize=None if kind == "none" else kind)
            with without():
                plain = build(quantize=None if kind == "none" else kind)
            for rows in map(int, a.rows.split(",")):
                found = list(runs(steps_of(compiled, plain, rows), rows, a.runs))
                rates = [run["read"] for run in found]
                middle = (min(rates) + max(rates)) / 2 if max(rates) > 1.3 * min(rates) else 0  # else there is one mode
                for these in ([r for r in found if r["read"] < middle], [r for r in found if r["read"] >= middle]):
                    if these:
                        print(line(kind, rows, these), flush=True)


if __name__ == "__main__":
    main()
