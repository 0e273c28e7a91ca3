"""Load time and peak memory: this library on one rank and on two, and the reference's way, side by side.

    python benchmarks/load.py [--shape 1.1B] [--runs 5] [--work FOLDER] [--json FILE]
    python benchmarks/load.py --quantize int8 --shape 13B --shards 2 [--work FOLDER] [--json FILE]

The reference's way is a full torch.load, then a copy into an allocated model; here in its cheapest reading, with no
change of dtype. Runs alternate, each in a fresh process; medians are printed. Before each, the file is read into the
page cache, and as much memory as the reference needs is touched and freed, since a virtual machine's first touch of
memory can cost more than all the rest.

With --quantize, this library alone, once: the time to load on one rank, the peak, and an answer; then the same from the
saved file, which is written in between.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import checkpoint, fresh, peak_rss, report, tokenizer

from llama import Llama
from llama.checkpoint import packed_file
from llama.planning import estimate


def reference_way(folder: str) -> None:
    stored = torch.load(f"{folder}/consolidated.00.pth", map_location="cpu", weights_only=True)
    model = {name: torch.empty_like(tensor) for name, tensor in stored.items()}
    for name, tensor in stored.items():
        model[name].copy_(tensor)


def settle(file: Path) -> None:
    with file.open("rb", buffering=0) as f:
        buffer = bytearray(1 << 24)
        while f.readinto(buffer):
            pass
    torch.ones(int(2.2 * file.stat().st_size), dtype=torch.uint8)


def measure(way: str, folder: str, tokenizer_path: str) -> None:
    begun = time.perf_counter()
    if way == "reference":
        reference_way(folder)
    else:
        Llama.build(folder, tokenizer_path, max_seq_len=512, max_batch_size=1, device="cpu")
    report(seconds=time.perf_counter() - begun, peak=peak_rss())


def quantized(folder: str, tokenizer_path: str, kind: str, save: str) -> None:
    if save == "save":
        begun = time.perf_counter()
        path = packed_file.save_packed_file(folder, kind)
        return report(seconds=time.perf_counter() - begun, peak=peak_rss(), bytes=path.stat().st_size)
    begun = time.perf_counter()
    llama = Llama.build(folder, tokenizer_path, max_seq_len=512, max_batch_size=1, device="cpu", quantize=kind)
    seconds, args = time.perf_counter() - begun, llama.model.params
    begun = time.perf_counter()
    llama.tokenizer.eos_id = -2  # nothing ends the answer
    (ids,), _ = llama.generate([[1, 7, 77, 777]], 8, temperature=0)
    speed = len(ids) / (time.perf_counter() - begun)
    weights = estimate.weight_bytes(args, 1, llama.model.norm.weight.dtype, kind)
    report(seconds=seconds, peak=peak_rss(), weights=weights, speed=speed, ids=ids)


def measure_quantized(a: argparse.Namespace, folder: Path, tokenizer_path: Path) -> None:
    packed_file.packed_file_path(folder, a.quantize).unlink(missing_ok=True)
    stored = sum(path.stat().st_size for path in folder.glob("*.pth"))
    steps = {"from the shards": "", "writing the file": "save", "from the file": ""}
    command = ("--quantized", folder, tokenizer_path, a.quantize)
    found = {step: fresh(Path(__file__), *command, save, threads=2)[0] for step, save in steps.items()}
    print(
        f"{a.shape}, {stored / 1e9:.2f} GB in {a.shards} shard(s), as {a.quantize} on one rank, CPU, torch {torch.__version__}"
    )
    for step, figures in found.items():
        about = f"{step:17} {figures['seconds']:7.1f} s, peak {figures['peak'] / 1e9:6.2f} GB"
        if "weights" in figures:
            more = f"{figures['weights'] / 1e9:.2f} GB of weights, 8 new ids at {figures['speed']:.1f} ids/s: {figures['ids']}"
            about += f" = {figures['peak'] / figures['weights']:.2f} times {more}"
        print(about)
    if a.json:
        a.json.write_text(json.dumps({"shape": a.shape, "bytes": stored, "kind": a.quantize, "found": found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--quantized", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        return measure(*a.measure)
    if a.quantized:
        return quantized(*a.quantized)

    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        folder, tokenizer_path = checkpoint(work, a.shape, a.shards), tokenizer(work)
        if a.quantize:
            return measure_quantized(a, folder, tokenizer_path)
        size = (folder / "consolidated.00.pth").stat().st_size
        ways = {"the reference's way": ("reference", 1), "ours, 1 rank": ("ours", 1), "ours, 2 ranks (each)": ("ours", 2)}
        runs: dict[str, list[dict]] = {name: [] for name in ways}
        for _ in range(a.runs):
            for name, (way, ranks) in ways.items():
                settle(folder / "consolidated.00.pth")
                seen = fresh(Path(__file__), "--measure", way, folder, tokenizer_path, ranks=ranks)
                runs[name].append({key: max(rank[key] for rank in seen) for key in ("seconds", "peak")})

    print(f"{a.shape}, {size / 1e9:.2f} GB in bfloat16, CPU, torch {torch.__version__}, median of {a.runs}")
    print(f"{'':22} {'load, s':>8} {'speed-up':>9} {'peak, GB':>9} {'of the file':>12}")
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in ("seconds", "peak")} for n, rs in runs.items()}
    for name, m in medians.items():
        ratio = medians["the reference's way"]["seconds"] / m["seconds"]
        print(f"{name:22} {m['seconds']:8.2f} {ratio:8.1f}x {m['peak'] / 1e9:9.2f} {m['peak'] / size:11.2f}x")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"shape": a.shape, "bytes": size, "torch": torch.__version__, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
