"""Compare continuous batching with static batches, on many prompts whose answers differ widely in length.

    python benchmarks/batching.py [--shape 1.1B] [--prompts 64] [--rows 8] [--shortest 12] [--runs 3] [--work FOLDER]

The lengths of the answers are spread evenly on a logarithmic scale, from --shortest to ten times --shortest tokens, in random
order. With static batches, the next --rows prompts start when all answers of the current batch have ended. With continuous
batching, each prompt starts as soon as a row is free. Runs of the two methods alternate. For each method, the script prints the
median speed, the shortest and the longest run, and the number of decode steps and of prefill passes.
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

from common import make_checkpoint, make_tokenizer

from llama import Llama, SamplingParams
from llama.engine.prefill import Prefill
from llama.engine.requests import GenerationCall, Request


def make_requests(n: int, shortest: int) -> list[Request]:
    rng = random.Random(0)
    lengths = [round(shortest * 10 ** (i / (n - 1))) for i in range(n)]
    rng.shuffle(lengths)
    return [Request([1, *(rng.randrange(3, 32000) for _ in range(rng.randrange(8, 33)))], length) for length in lengths]


def run_static(llama: Llama, requests: list[Request]) -> Iterator[None]:
    rows = llama.model.params.max_batch_size
    for i in range(0, len(requests), rows):
        yield from run_continuous(llama, requests[i : i + rows])


def run_continuous(llama: Llama, requests: list[Request]) -> Iterator[None]:
    for _ in llama.engine.run(GenerationCall(requests, SamplingParams(0), stop_token=-1)):
        yield


def count_calls(counts: collections.Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a wrapper of `function` that counts each call in `counts[name]`."""

    def counted(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*args, **options)

    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="model size; default: 1.1B")
    parser.add_argument("--prompts", type=int, default=64, help="number of prompts; default: 64")
    parser.add_argument("--rows", type=int, default=8, help="max_batch_size; default: 8")
    parser.add_argument("--shortest", type=int, default=12, help="tokens of the shortest answer; default: 12")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each method; default: 3")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint; default: a temporary one")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        llama = Llama.build(make_checkpoint(work, a.shape), make_tokenizer(work), 10 * a.shortest + 40, a.rows)
        # Wrappers of engine functions count the calls. Hooks on the model's modules would make the engine use a slower path.
        backend, counts = llama.engine.backend, collections.Counter[str]()
        begin = backend.begin
        Prefill.run_chunk = count_calls(counts, "prefills", Prefill.run_chunk)  # type: ignore[method-assign]
        backend.begin = lambda *args: count_calls(counts, "steps", begin(*args))  # type: ignore[method-assign]
        seconds: dict[str, list[float]] = {"static": [], "continuous": []}
        for _ in range(a.runs):
            for method, run in (("static", run_static), ("continuous", run_continuous)):
                llama.clear_prefix_cache()
                counts.clear()
                start = time.perf_counter()
                n_tokens = sum(1 for _ in run(llama, make_requests(a.prompts, a.shortest)))
                seconds[method].append(time.perf_counter() - start)
                if len(seconds[method]) == 1:
                    work_done = f"{counts['steps']} decode steps, {counts['prefills']} forward passes of prompts"
                    print(f"{method:<12}{n_tokens} tokens, {work_done}", flush=True)
        medians = {method: statistics.median(times) for method, times in seconds.items()}
        for method, times in seconds.items():
            rate = n_tokens / medians[method]
            print(f"{method:<12}{rate:8.1f} tokens/s   {medians[method]:7.2f} s ({min(times):.2f} to {max(times):.2f})")
        print(f"continuous batching is {medians['static'] / medians['continuous']:.2f} times as fast")


if __name__ == "__main__":
    main()
