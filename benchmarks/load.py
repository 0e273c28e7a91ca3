"""Load time and peak memory: this library on one rank and on two, and the reference's way, side by side.

    python benchmarks/load.py [--shape 1.1B] [--runs 5] [--work FOLDER] [--json FILE]

The reference's way is a full torch.load, then a copy into an allocated model; here in its cheapest reading, with no
change of dtype. Runs alternate, each in a fresh process; medians are printed. Before each, the file is read into the
page cache, and as much memory as the reference needs is touched and freed, since a virtual machine's first touch of
memory can cost more than all the rest.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        return measure(*a.measure)

    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        folder, tokenizer_path = checkpoint(work, a.shape), tokenizer(work)
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
