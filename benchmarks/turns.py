"""A conversation: the time to the first piece of an answer, turn by turn, with keys and values kept and without.

    python benchmarks/turns.py [--shape 1.1B] [--turns 10] [--new 40] [--runs 3] [--work FOLDER]

Each turn adds a question of about 12 ids and an answer of --new ids to the dialog. With reuse a turn computes only what is
new in it, without it the whole dialog again. Runs take turns; medians are printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import checkpoint, tokenizer

from llama import Llama
from llama.engine.requests import GenerationCall, Request
from llama.sampling import SamplingParams

QUESTION = 12


def conversation(llama: Llama, turns: int, new: int, reuse: bool) -> tuple[list[int], list[float]]:
    """The ids of each prompt, and the seconds until each answer's first id."""
    ids, lengths, seconds = [1], [], []
    for turn in range(turns):
        ids += [1000 + 31 * turn + i for i in range(QUESTION)]
        begun = time.perf_counter()
        stream = llama.engine.run(GenerationCall([Request(list(ids), new)], SamplingParams(0), reuse=reuse), -1)
        answer = [next(stream).token]
        seconds.append(time.perf_counter() - begun)
        lengths.append(len(ids))
        ids += answer + [token.token for token in stream]
    return lengths, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint (default: a temporary folder)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        llama = Llama.build(checkpoint(work, a.shape), tokenizer(work), a.turns * (a.new + QUESTION) + 8, 1)
        conversation(llama, 2, 4, True)  # the first touch of memory
        runs: dict[bool, list[list[float]]] = {True: [], False: []}
        for _ in range(a.runs):
            for reuse, found in runs.items():
                lengths, seconds = conversation(llama, a.turns, a.new, reuse)
                found.append(seconds)
    print(f"{a.shape}, medians of {a.runs}: seconds to the first id\n")
    print(f"{'turn':>5}{'ids':>7}{'kept':>9}{'anew':>9}")
    for turn in (0, 1, a.turns // 2, a.turns - 1):
        kept, anew = (statistics.median(run[turn] for run in runs[reuse]) for reuse in (True, False))
        print(f"{turn + 1:5}{lengths[turn]:7}{kept:9.3f}{anew:9.3f}")


if __name__ == "__main__":
    main()
