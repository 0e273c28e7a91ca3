"""Compare the implementations of a decode step on a CPU, in one process and on the same random weights.

    python benchmarks/compiled.py [--shape 1.1B] [--formats none,int8,int4] [--rows 1,4] [--runs 12] [--threads 2]
        [--work FOLDER]

    fused       all layers in one call of C (decode_avx512.c), if it supports the CPU and the model
    layerwise   the engine layer by layer, with the compiled C kernels
    PyTorch     the engine without any compiled C, as with LLAMA_COMPILED=0
    module      `Transformer.forward` with the compiled C kernels, as for a model whose modules the caller has changed

Each run first measures the memory bandwidth with a plain read. Then the run times two steps of each implementation and keeps
the shorter time. In virtual machines the memory bandwidth may change within minutes. The script therefore prints one line of
medians for the runs with a low bandwidth, and one for the runs with a high bandwidth. The ratio compares PyTorch with the
fastest implementation. To measure as on a CPU with AVX2 only, set ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2.
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
from common import SHAPES, make_checkpoint, make_tokenizer

from llama import Llama
from llama.backends import cpu
from llama.engine.forward import EngineForward
from llama.engine.kv_cache import RaggedBatch
from llama.kernels import avx2, avx512, c_extension, pack

READ_BYTES = 500_000_000
IMPLEMENTATIONS = "fused", "layerwise", "PyTorch", "module"
Step = Callable[[torch.Tensor, int], torch.Tensor]  # a decode step: tokens (B,) and one position for all rows -> logits


def without_extensions() -> contextlib.ExitStack:
    """Return a context manager inside which models are built and run as if no C had been compiled."""
    stack = contextlib.ExitStack()
    for module in (avx512, avx2, pack):
        stack.enter_context(mock.patch.object(module, "status", lambda: c_extension.ExtensionStatus(None)))
    return stack


def time_call(function: Callable[[], object]) -> float:
    """Call a function without arguments, and return the duration of the call in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def engine_step(forward: EngineForward, hidden_states: Callable[[torch.Tensor, RaggedBatch], torch.Tensor]) -> Step:
    """Return a decode step function that computes all layers with `hidden_states`, and then the logits with the engine."""

    def step(tokens: torch.Tensor, position: int) -> torch.Tensor:
        batch = RaggedBatch.from_segments([(row, position, 1) for row in range(len(tokens))])
        return forward.logits(hidden_states(tokens, batch))

    return step


def make_steps(compiled: Llama, without_c: Llama, rows: int) -> dict[str, Step]:
    """Return a decode step function for each implementation that supports the model. rows: the batch size of the steps."""
    forward, pytorch = compiled.engine.forward(), without_c.engine.forward()
    steps = {"layerwise": engine_step(forward, forward.hidden_states), "PyTorch": engine_step(pytorch, pytorch.hidden_states)}
    if cpu.why_unsupported(forward) is None:
        steps["fused"] = engine_step(forward, cpu.FusedDecodeStep(forward, rows))
    steps["module"] = lambda tokens, position: compiled.model.forward(tokens.unsqueeze(1), position)
    return steps


def measure(steps: dict[str, Step], rows: int, n_runs: int) -> Iterator[dict[str, float]]:
    """Yield the figures of each run: memory bandwidth as "read", in bytes/s, and seconds per step by implementation."""
    memory, tokens = torch.ones(READ_BYTES // 4), torch.full((rows,), 5)
    for run in range(n_runs):
        figures = {"read": READ_BYTES / time_call(memory.sum)}
        for name, step in steps.items():
            with without_extensions() if name == "PyTorch" else contextlib.nullcontext():
                positions = (20 + 2 * run % 200, 21 + 2 * run % 200)
                figures[name] = min(time_call(functools.partial(step, tokens, position)) for position in positions)
        yield figures


def format_line(weight_format: str, rows: int, runs: list[dict[str, float]]) -> str:
    """Return one line of the table: the medians of the given runs."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    ratio = statistics.median(run["PyTorch"] / min(run[name] for name in IMPLEMENTATIONS if name in run) for run in runs)
    columns = [f"{medians[name] * 1e3:10.1f}" if name in medians else f"{'-':>10}" for name in IMPLEMENTATIONS]
    return f"{weight_format:8}{rows:5}{len(runs):6}{medians['read'] / 1e9:12.0f}{''.join(columns)}{ratio:7.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--formats", default="none,int8,int4", help="formats of the weights; none: bfloat16; default: all")
    parser.add_argument("--rows", default="1,4", help="batch sizes; default: 1,4")
    parser.add_argument("--runs", type=int, default=12, help="measurements of each implementation; default: 12")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint; default: a temporary one")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        work = a.work or Path(temporary)
        ckpt_dir, tokenizer_path = make_checkpoint(work, a.shape), make_tokenizer(work)
        print("steps in ms")
        names = "".join(f"{name:>10}" for name in IMPLEMENTATIONS)
        print(f"{'weights':8}{'rows':>5}{'runs':>6}{'read, GB/s':>12}{names}{'ratio':>8}")
        for weight_format in a.formats.split(","):
            build = functools.partial(Llama.build, ckpt_dir, tokenizer_path, 256, 16, device="cpu")
            quantize = None if weight_format == "none" else weight_format
            compiled = build(quantize=quantize)
            with without_extensions():
                without_c = build(quantize=quantize)
            for rows in map(int, a.rows.split(",")):
                runs = list(measure(make_steps(compiled, without_c, rows), rows, a.runs))
                rates = [run["read"] for run in runs]
                # If the bandwidths differ by more than 30%, split the runs at the middle between the lowest and the highest.
                threshold = (min(rates) + max(rates)) / 2 if max(rates) > 1.3 * min(rates) else 0
                slow, fast = ([r for r in runs if (r["read"] >= threshold) == above] for above in (False, True))
                for subset in (slow, fast):
                    if subset:
                        print(format_line(weight_format, rows, subset), flush=True)


if __name__ == "__main__":
    main()
