"""Measure the time to the first token of each answer in a conversation, with and without the prefix cache.

    python benchmarks/turns.py [--shape 1.1B] [--turns 10] [--new 40] [--runs 3] [--work FOLDER]

Each turn adds a question of 12 tokens and an answer of --new tokens to the dialog. With the prefix cache, a turn computes
only the last answer and the question; without it, the whole dialog. Conversations with and without the cache alternate, and the
script prints medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import make_checkpoint, make_tokenizer

from llama import Llama
from llama.engine.requests import GenerationCall, Request
from llama.sampling import SamplingParams

QUESTION_TOKENS = 12


def run_conversation(llama: Llama, turns: int, new: int, shares: bool) -> tuple[list[int], list[float]]:
    """Return, for each turn, the prompt's length in tokens and the seconds until the first token of the answer."""
    tokens, lengths, seconds = [1], [], []
    for turn in range(turns):
        tokens += [1000 + 31 * turn + i for i in range(QUESTION_TOKENS)]
        if not shares:
            llama.clear_prefix_cache()
        start = time.perf_counter()
        call = GenerationCall([Request(list(tokens), new)], SamplingParams(0), stop_token=-1)
        stream = llama.engine.run(call)
        answer = [next(stream).token]
        seconds.append(time.perf_counter() - start)
        lengths.append(len(tokens))
        tokens += answer + [generated.token for generated in stream]
    return lengths, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="model size; default: 1.1B")
    parser.add_argument("--turns", type=int, default=10, help="turns of the conversation; default: 10")
    parser.add_argument("--new", type=int, default=40, help="tokens of each answer; default: 40")
    parser.add_argument("--runs", type=int, default=3, help="conversations with and without the cache; default: 3")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint; default: a temporary one")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        context = a.turns * (a.new + QUESTION_TOKENS) + 8
        llama = Llama.build(make_checkpoint(work, a.shape), make_tokenizer(work), context, 1)
        run_conversation(llama, 2, 4, True)  # a warm-up, because the first use of memory is slow
        runs: dict[bool, list[list[float]]] = {True: [], False: []}
        for _ in range(a.runs):
            for shares, conversations in runs.items():
                lengths, seconds = run_conversation(llama, a.turns, a.new, shares)
                conversations.append(seconds)
    print(f"{a.shape}, medians of {a.runs}: seconds to the first token\n")
    print(f"{'turn':>5}{'tokens':>8}{'cache':>9}{'no cache':>10}")
    for turn in (0, 1, a.turns // 2, a.turns - 1):
        with_cache, without = (statistics.median(run[turn] for run in runs[shares]) for shares in (True, False))
        print(f"{turn + 1:5}{lengths[turn]:8}{with_cache:9.3f}{without:10.3f}")


if __name__ == "__main__":
    main()
