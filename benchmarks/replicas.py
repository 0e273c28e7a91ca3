"""Compare the speed of two replicas with that of one model, on the same prompts and the same CPU cores.

Two replicas divide the prompts of a call, or take them from the queue of rank 0, which leads.

    python benchmarks/replicas.py [--shape 1.1B] [--prompts 32] [--new 32] [--rows 8] [--runs 3] [--threads 2] [--work FOLDER]
        [--json FILE]

Each measurement starts new processes, which load the model and answer all prompts in one call. The configurations alternate.
The script prints the median, the minimum and the maximum of the tokens/s of each.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from common import SHAPES, make_checkpoint, make_tokenizer, print_figures, run_python

CONFIGURATIONS = {  # name: (number of ranks, number of ranks that share one model, fraction of --threads to use, rank 0 leads)
    "1 replica, half the threads": (1, 1, 0.5, False),
    "1 replica": (1, 1, 1, False),
    "1 model on 2 ranks": (2, 2, 1, False),
    "2 replicas": (2, 1, 1, False),
    "2 replicas, rank 0 leads": (2, 1, 1, True),
}


def measure(ckpt_dir: str, tokenizer_path: str, ranks_per_model: int, n_prompts: int, new: int, rows: int, leads: int) -> None:
    import torch

    from llama import Llama

    options = {"model_parallel_size": ranks_per_model, "device": "cpu"}
    llama = Llama.build(ckpt_dir, tokenizer_path, new + 40, rows, **options)
    rng = random.Random(0)
    prompts = [[1, *(rng.randrange(3, 32000) for _ in range(rng.randrange(8, 33)))] for _ in range(n_prompts)]
    llama.generate(prompts[:rows], 2, temperature=0)
    llama.clear_prefix_cache()
    start = time.perf_counter()
    generate = partial(llama.generate, prompts, new, temperature=0)
    answers, _ = (llama.lead(generate) or ([], None)) if leads else generate()
    seconds = time.perf_counter() - start
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print_figures(seconds=seconds, tokens=sum(map(len, answers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--prompts", type=int, default=32, help="number of prompts; default: 32")
    parser.add_argument("--new", type=int, default=32, help="new tokens per prompt; default: 32")
    parser.add_argument("--rows", type=int, default=8, help="max_batch_size of each replica; default: 8")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each configuration; default: 3")
    parser.add_argument("--threads", type=int, default=2, help="threads of all ranks together; default: 2")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    rates: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        files = make_checkpoint(work, a.shape), make_tokenizer(work)
        for _ in range(a.runs):
            for name, (ranks, model_parallel_size, share, leads) in CONFIGURATIONS.items():
                command = __file__, "measure", *files, model_parallel_size, a.prompts, a.new, a.rows, int(leads)
                (figures,) = run_python(*command, ranks=ranks, threads=max(1, round(a.threads * share)))
                rates[name].append(figures["tokens"] / figures["seconds"])
                print(f"{name}: {rates[name][-1]:.1f} tokens/s", file=sys.stderr)
    one_replica = statistics.median(rates["1 replica"])
    print(
        f"{a.shape}, {a.prompts} prompts of 8 to 32 tokens after BOS, {a.new} new tokens each, {a.rows} rows per replica, "
        f"{a.threads} threads\n"
    )
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<29}{median:7.1f} tokens/s  ({min(values):.1f} to {max(values):.1f}){median / one_replica:8.2f}x")
    if a.json:
        setup = {k: v for k, v in vars(a).items() if k not in ("work", "json")}
        a.json.write_text(json.dumps({"setup": setup, "ids/s": rates}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main()
