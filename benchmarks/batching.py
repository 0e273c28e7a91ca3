"""Continuous batching beside fixed waves: many prompts, max_batch_size rows at a time, answers of very different length.

    python benchmarks/batching.py [--shape 1.1B] [--prompts 64] [--rows 8] [--shortest 12] [--runs 3] [--work FOLDER]

The answers' lengths are spread evenly on a logarithmic scale from --shortest to ten times that, and shuffled. In waves the
next prompts start when all of the wave have ended; in one call each starts where one ends. Runs take turns; medians and
the extremes are printed, and what was computed: decode steps, and forwards that read prompts.
"""

import argparse
import collections
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import checkpoint, tokenizer

from llama import Llama, SamplingParams
from llama.engine.requests import GenerationCall, Request


def requests(n: int, shortest: int) -> list[Request]:
    draw = random.Random(0)
    lengths = [round(shortest * 10 ** (i / (n - 1))) for i in range(n)]
    draw.shuffle(lengths)
    return [Request([1, *(draw.randrange(3, 32000) for _ in range(draw.randrange(8, 33)))], length) for length in lengths]


def in_waves(llama: Llama, todo: list[Request]) -> Iterator[None]:
    rows = llama.model.params.max_batch_size
    for i in range(0, len(todo), rows):
        yield from continuous(llama, todo[i : i + rows])


def continuous(llama: Llama, todo: list[Request]) -> Iterator[None]:
    for _ in llama.engine.run(GenerationCall(todo, SamplingParams(0)), eos_id=-1):
        yield


def counted(counts: collections.Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*args, **options)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint (default: a temporary folder)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        window = 10 * a.shortest + 40
        llama = Llama.build(checkpoint(work, a.shape), tokenizer(work), window, a.rows)
        engine, counts = llama.engine, collections.Counter[str]()  # a hook on the model would have it go another way
        begin = engine.backend.begin
        engine.prefill = counted(counts, "forwards", engine.prefill)  # type: ignore[method-assign]
        engine.backend.begin = lambda *args: counted(counts, "steps", begin(*args))  # type: ignore[method-assign]
        seconds: dict[str, list[float]] = {"waves": [], "continuous": []}
        for _ in range(a.runs):
            for way, answer in (("waves", in_waves), ("continuous", continuous)):
                counts.clear()
                begun = time.perf_counter()
                n_ids = sum(1 for _ in answer(llama, requests(a.prompts, a.shortest)))
                seconds[way].append(time.perf_counter() - begun)
                if len(seconds[way]) == 1:
                    made = f"{counts['steps']} steps and {counts['forwards']} forwards of prompts"
                    print(f"{way:<12}{n_ids} ids, {made}", flush=True)
        for way, each in seconds.items():
            middle = statistics.median(each)
            print(f"{way:<12}{n_ids / middle:8.1f} ids/s   {middle:7.2f} s ({min(each):.2f} to {max(each):.2f})")
        print(f"continuous is {statistics.median(seconds['waves']) / statistics.median(seconds['continuous']):.2f}x as fast")


if __name__ == "__main__":
    main()
