"""Two replicas beside one model: the same prompts, on the same cores.

    python benchmarks/replicas.py [--shape 1.1B] [--prompts 32] [--new 32] [--rows 8] [--runs 3] [--threads 2] [--work FOLDER]
        [--json FILE]

Every process keeps its model and answers all prompts in one call. Ways take turns; medians and extremes are printed.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import SHAPES, checkpoint, fresh, report, tokenizer

WAYS = {  # ranks, those that share one model, share of the threads that all ranks have together
    "1 replica, half the threads": (1, 1, 0.5),
    "1 replica": (1, 1, 1),
    "1 model on 2 ranks": (2, 2, 1),
    "2 replicas": (2, 1, 1),
}


def measure(folder: str, tokenizer_path: str, size: int, prompts: int, new: int, rows: int) -> None:
    import torch

    from llama import Llama

    llama = Llama.build(folder, tokenizer_path, new + 40, rows, model_parallel_size=size, device="cpu")
    draw = random.Random(0)
    asked = [[1, *(draw.randrange(3, 32000) for _ in range(draw.randrange(8, 33)))] for _ in range(prompts)]
    llama.generate(asked[:rows], 2, temperature=0)
    begun = time.perf_counter()
    ids, _ = llama.generate(asked, new, temperature=0)
    seconds = time.perf_counter() - begun
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        report(seconds=seconds, ids=sum(map(len, ids)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8, help="of each replica")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        files = checkpoint(work, a.shape), tokenizer(work)
        for _ in range(a.runs):
            for way, (ranks, size, share) in WAYS.items():
                command = __file__, "measure", *files, size, a.prompts, a.new, a.rows
                (found,) = fresh(*command, ranks=ranks, threads=max(1, round(a.threads * share)))
                rates[way].append(found["ids"] / found["seconds"])
                print(f"{way}: {rates[way][-1]:.1f} ids/s", file=sys.stderr)
    one = statistics.median(rates["1 replica"])
    print(
        f"{a.shape}, {a.prompts} prompts of 8 to 32 ids, {a.new} new ids each, {a.rows} rows a replica, {a.threads} threads\n"
    )
    for way, each in rates.items():
        middle = statistics.median(each)
        print(f"{way:<29}{middle:7.1f} ids/s  ({min(each):.1f} to {max(each):.1f}){middle / one:8.2f}x")
    if a.json:
        setup = {k: v for k, v in vars(a).items() if k not in ("work", "json")}
        a.json.write_text(json.dumps({"setup": setup, "ids/s": rates}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main()
