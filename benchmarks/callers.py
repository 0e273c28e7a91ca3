"""Measure a model that many callers share: throughput of threads, time to the first token, and gaps in a running stream.

    python benchmarks/callers.py [--shape 1.1B] [--callers 64] [--rows 8] [--new 32] [--runs 5] [--long 3000] [--work FOLDER]

throughput    --callers prompts of 8 to 32 tokens with --new new tokens each: one call with all prompts, against a thread with a
              call of its own for each prompt. Runs of the two alternate.
first token   of a prompt of 64 tokens: alone, and while all other rows decode.
longest gap   between two tokens of a running stream while a prompt of --long tokens is prefilled: in chunks between the
              stream's steps, against all chunks one after another.

Each figure is the median of all runs, with the shortest and the longest.
"""

import argparse
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import make_checkpoint, make_tokenizer

from llama import Llama, SamplingParams, tuning
from llama.engine.requests import GenerationCall, Request

GREEDY = SamplingParams(0)


def run(llama: Llama, requests: list[Request]) -> list[float]:
    """Run a call to its end, without EOS; return the time of each of its tokens, in seconds."""
    call = GenerationCall(requests, GREEDY, stop_token=-1)
    return [time.perf_counter() for _ in llama.engine.run(call)]


def make_prompt(rng: random.Random, n: int) -> list[int]:
    return [1, *(rng.randrange(3, 32000) for _ in range(n - 1))]


def throughput(llama: Llama, prompts: list[list[int]], new: int) -> dict[str, float]:
    """Return the seconds of one call with all prompts, and of one thread for each prompt."""
    llama.clear_prefix_cache()  # here and below: no prompt may profit from an earlier measurement
    start = time.perf_counter()
    run(llama, [Request(prompt, new) for prompt in prompts])
    middle = time.perf_counter()
    llama.clear_prefix_cache()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: run(llama, [Request(prompt, new)]), prompts))
    return {"one call": middle - start, "threads": time.perf_counter() - middle}


def first_token(llama: Llama, prompt: list[int], rows: int) -> dict[str, float]:
    """Return the seconds to the first token of a prompt, alone and while all other rows decode."""
    seconds = {}
    for name, others in (("alone", 0), (f"beside {rows - 1} rows", rows - 1)):
        with ThreadPoolExecutor(max(others, 1)) as pool:
            busy = [pool.submit(run, llama, [Request([1, 5 + i], 48)]) for i in range(others)]
            if busy:
                time.sleep(0.5)
            llama.clear_prefix_cache()
            start = time.perf_counter()
            seconds[name] = run(llama, [Request(prompt, 1)])[0] - start
            for future in busy:
                future.result()
    return seconds


def longest_gap(llama: Llama, prompt: list[int]) -> dict[str, float]:
    """Return the longest time between two tokens of a stream while a long prompt is prefilled, in two ways."""
    seconds = {}
    chunk = tuning.PREFILL_CHUNK_BESIDE_DECODING
    for name, tokens in (("between steps", chunk), ("at once", tuning.PREFILL_CHUNK)):
        tuning.PREFILL_CHUNK_BESIDE_DECODING = tokens
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(run, llama, [Request([1, 5], 96)])
            time.sleep(0.5)
            llama.clear_prefix_cache()
            run(llama, [Request(prompt, 1)])
            times = stream.result()
        seconds[name] = max(b - a for a, b in itertools.pairwise(times))
    tuning.PREFILL_CHUNK_BESIDE_DECODING = chunk
    return seconds


def report(title: str, runs: int, measure: Callable[[], dict[str, float]]) -> None:
    """Print the median of all runs for each case, and the ratio of the first case to the second."""
    results = [measure() for _ in range(runs)]
    medians = {}
    for name in results[0]:
        values = [result[name] for result in results]
        medians[name] = statistics.median(values)
        print(f"{title:<14}{name:<16}{medians[name]:8.3f} s ({min(values):.3f} to {max(values):.3f})", flush=True)
    first, second = medians.values()
    print(f"{title:<14}{'ratio':<16}{first / second:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="model size; default: 1.1B")
    parser.add_argument("--callers", type=int, default=64, help="prompts, and threads; default: 64")
    parser.add_argument("--rows", type=int, default=8, help="max_batch_size; default: 8")
    parser.add_argument("--new", type=int, default=32, help="new tokens of each prompt; default: 32")
    parser.add_argument("--long", type=int, default=3000, help="tokens of the long prompt; default: 3000")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each figure; default: 5")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint; default: a temporary one")
    a = parser.parse_args()
    rng = random.Random(0)
    prompts = [make_prompt(rng, rng.randrange(8, 33)) for _ in range(a.callers)]
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        llama = Llama.build(make_checkpoint(work, a.shape), make_tokenizer(work), a.long + 96, a.rows)
        run(llama, [Request([1, 5], 4)])
        report("throughput", a.runs, lambda: throughput(llama, prompts, a.new))
        report("first token", a.runs, lambda: first_token(llama, make_prompt(rng, 64), a.rows))
        report("longest gap", a.runs, lambda: longest_gap(llama, make_prompt(rng, a.long)))


if __name__ == "__main__":
    main()
