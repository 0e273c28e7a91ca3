"""Measure the time from loading to the first token, and peak memory, with the files in the page cache: beside llama.cpp.

    python benchmarks/first_token.py [--shape 1.1B] [--runs 5] [--threads 2] [--work FOLDER] [--json FILE]

For bfloat16, int8 and int4: from the shards (.pth), from the file that `python -m llama quantize` writes, and llama.cpp from
its BF16, Q8_0 and Q4_0. Each run is a fresh process, and the ways take turns. Imports, and the first run of each way, which
fills the cache, are not counted.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from common import checkpoint, fresh, tokenizer
from peers import Job
from speed import Worker

from llama.checkpoint import packed_file

KINDS = {"bfloat16": ("ours", "llama.cpp"), "int8": ("ours:int8", "llama.cpp:Q8_0"), "int4": ("ours:int4", "llama.cpp:Q4_0")}


def with_saved(folder: Path) -> Path:
    """A folder beside this one, of the same shards and the files made from them."""
    beside = folder.with_name(f"{folder.name}-saved")
    beside.mkdir(exist_ok=True)
    for file in [*folder.glob("*.pth"), folder / "params.json"]:
        if not (beside / file.name).exists():
            (beside / file.name).hardlink_to(file)
    for kind in KINDS:
        if not packed_file.packed_file_path(beside, kind).exists():
            packed_file.save_packed_file(beside, kind)
    return beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoints (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        folder, vocabulary = checkpoint(work, a.shape), tokenizer(work)
        beside = with_saved(folder)
        print(f"{'':10}{'':16}{'seconds':>9}{'of llama.cpp':>14}{'peak, GB':>10}")
        for kind, (ours, other) in KINDS.items():
            common = (str(vocabulary), str(work / folder.name), "bfloat16", "cpu", a.threads, 1, 512)
            ways = {
                "from .pth": Job(ours, str(folder), *common),
                "from its file": Job(ours, str(beside), *common),
                other: Job(other, str(folder), *common),
            }
            fresh("-m", "peers.convert", json.dumps(asdict(ways[other])), threads=a.threads)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
            for run in range(a.runs + 1):
                for name, job in ways.items():
                    worker = Worker(job)
                    worker.process.kill()
                    worker.process.wait()
                    if run:
                        found[name].append(worker.load)
            results[kind] = found
            seconds = {name: statistics.median(r["seconds"] for r in runs) for name, runs in found.items()}
            for name, runs in found.items():
                peak = statistics.median(r["peak"] for r in runs) / 1e9
                print(f"{kind:10}{name:16}{seconds[name]:9.2f}{seconds[name] / seconds[other]:13.2f}x{peak:10.2f}", flush=True)
    if a.json:
        a.json.write_text(json.dumps({"shape": a.shape, "kinds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
