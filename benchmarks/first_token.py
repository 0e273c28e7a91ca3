"""Measure the time from the start of loading to the first token, and peak memory, in comparison with llama.cpp.

    python benchmarks/first_token.py [--shape 1.1B] [--runs 5] [--threads 2] [--work FOLDER] [--json FILE]

The script compares three ways to load a model in bfloat16, int8 and int4: this library from the shards (.pth), this library
from the packed file that `python -m llama quantize` writes, and llama.cpp from its file in BF16, Q8_0 or Q4_0. The three ways
alternate, and each run is a new process. The times exclude imports. All files are in the page cache: the first run of each way
reads them and is not counted.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from common import make_checkpoint, make_tokenizer, run_python
from peers import Job
from speed import Worker

from llama.checkpoint import packed_file

FORMATS = {"bfloat16": ("ours", "llama.cpp"), "int8": ("ours:int8", "llama.cpp:Q8_0"), "int4": ("ours:int4", "llama.cpp:Q4_0")}


def make_packed_files(folder: Path) -> Path:
    """Write a second folder with hard links to the shards and a packed file in each format; return the second folder.

    Files that exist already are not written again.
    """
    packed_folder = folder.with_name(f"{folder.name}-saved")
    packed_folder.mkdir(exist_ok=True)
    for file in [*folder.glob("*.pth"), folder / "params.json"]:
        if not (packed_folder / file.name).exists():
            (packed_folder / file.name).hardlink_to(file)
    for weight_format in FORMATS:
        if not packed_file.packed_file_path(packed_folder, weight_format).exists():
            packed_file.save_packed_file(packed_folder, weight_format)
    return packed_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="model size; default: 1.1B")
    parser.add_argument("--runs", type=int, default=5, help="loads that count, of each file; default: 5")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoints; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    a = parser.parse_args()
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        folder, tokenizer_path = make_checkpoint(work, a.shape), make_tokenizer(work)
        packed_folder = make_packed_files(folder)
        print(f"{'':10}{'':16}{'seconds':>9}{'of llama.cpp':>14}{'peak, GB':>10}")
        for weight_format, (ours, llama_cpp) in FORMATS.items():
            common = (str(tokenizer_path), str(work / folder.name), "bfloat16", "cpu", a.threads, 1, 512)
            jobs = {
                "from .pth": Job(ours, str(folder), *common),
                "from its file": Job(ours, str(packed_folder), *common),
                llama_cpp: Job(llama_cpp, str(folder), *common),
            }
            run_python("-m", "peers.convert", json.dumps(asdict(jobs[llama_cpp])), threads=a.threads)
            loads: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
            for run in range(a.runs + 1):
                for name, job in jobs.items():
                    worker = Worker(job)
                    worker.process.kill()
                    worker.process.wait()
                    if run:
                        loads[name].append(worker.load)
            results[weight_format] = loads
            seconds = {name: statistics.median(r["seconds"] for r in runs) for name, runs in loads.items()}
            for name, runs in loads.items():
                peak = statistics.median(r["peak"] for r in runs) / 1e9
                relative = seconds[name] / seconds[llama_cpp]
                print(f"{weight_format:10}{name:16}{seconds[name]:9.2f}{relative:13.2f}x{peak:10.2f}", flush=True)
    if a.json:
        a.json.write_text(json.dumps({"shape": a.shape, "kinds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
