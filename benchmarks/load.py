"""Measure load time and peak memory of this library on one and on two ranks, in comparison with facebookresearch/llama.

    python benchmarks/load.py [--shape 1.1B] [--runs 5] [--work FOLDER] [--json FILE]
    python benchmarks/load.py --quantize int8 --shape 13B --shards 2 [--work FOLDER] [--json FILE]
    python benchmarks/load.py --layouts [--quantize int8] --shape 7B --runs 3 [--work FOLDER] [--json FILE]

facebookresearch/llama (the reference) reads a whole file with torch.load and copies each tensor into an allocated model. In
this benchmark the copies keep the dtype, which is the fastest case of the reference. The two libraries alternate, and each run
is a new process. The script prints medians. Before each run, the file is read into the page cache, and as much memory as the
reference needs is allocated, written and freed. Otherwise, in a virtual machine, the first use of memory could cost more time
than the load itself.

With --quantize, the script measures only this library, on one rank and once. It loads the shards and generates a short answer,
writes the packed file, then loads the packed file and generates the same answer again.

With --layouts, the script compares Meta's layout with Hugging Face's of the same weights, which alternate: seconds, seconds of
CPU time and peak memory.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import make_checkpoint, make_tokenizer, peak_rss, print_figures, run_python

from llama import Llama, convert_checkpoint
from llama.checkpoint import packed_file
from llama.planning import estimate


def load_like_reference(ckpt_dir: str) -> None:
    stored = torch.load(f"{ckpt_dir}/consolidated.00.pth", map_location="cpu", weights_only=True)
    model = {name: torch.empty_like(tensor) for name, tensor in stored.items()}
    for name, tensor in stored.items():
        model[name].copy_(tensor)


def warm_memory(file: Path) -> None:
    """Read a file into the page cache. Then allocate, write and free 2.2 times as much memory as the size of the file."""
    with file.open("rb", buffering=0) as f:
        buffer = bytearray(1 << 24)
        while f.readinto(buffer):
            pass
    torch.ones(int(2.2 * file.stat().st_size), dtype=torch.uint8)


def measure(loader: str, ckpt_dir: str, tokenizer_path: str) -> None:
    start = time.perf_counter()
    if loader == "reference":
        load_like_reference(ckpt_dir)
    else:
        Llama.build(ckpt_dir, tokenizer_path, max_seq_len=512, max_batch_size=1, device="cpu")
    print_figures(seconds=time.perf_counter() - start, peak=peak_rss())


def measure_layout(ckpt_dir: str, tokenizer_path: str, weight_format: str) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    Llama.build(ckpt_dir, tokenizer_path, max_seq_len=512, max_batch_size=1, device="cpu", quantize=weight_format or None)
    print_figures(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu, peak=peak_rss())


def compare_layouts(a: argparse.Namespace, metas: Path, tokenizer_path: Path) -> None:
    """Load the same weights from Meta's and from Hugging Face's layout, alternately, and print medians and their ratios."""
    theirs = metas.with_name(f"{metas.name}-hf")
    if not theirs.exists():
        convert_checkpoint(metas, theirs, "hf", a.shards)
    runs: dict[str, list[dict]] = {"Meta's": [], "Hugging Face's": []}
    for _ in range(a.runs):
        for layout, folder in zip(runs, (metas, theirs), strict=True):
            command = (Path(__file__), "--measure_layout", folder, tokenizer_path, a.quantize or "")
            runs[layout] += run_python(*command)
    print(f"{a.shape}, {a.quantize or 'bfloat16'}, one rank, CPU, torch {torch.__version__}, median of {a.runs}")
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in ("seconds", "cpu", "peak")} for n, rs in runs.items()}
    for layout, m in medians.items():
        print(f"{layout:15} {m['seconds']:7.1f} s, {m['cpu']:7.1f} s of CPU time, peak {m['peak'] / 1e9:6.2f} GB")
    ratios = [medians["Hugging Face's"][key] / value for key, value in medians["Meta's"].items()]
    print(f"{'ratio':15} {ratios[0]:7.2f} {ratios[1]:9.2f} {ratios[2]:21.2f}")
    if a.json:
        record = {"shape": a.shape, "kind": a.quantize, "torch": torch.__version__, "runs": runs}
        a.json.write_text(json.dumps(record, indent=1) + "\n")


def measure_quantized(ckpt_dir: str, tokenizer_path: str, weight_format: str, action: str) -> None:
    """Measure one step and print its figures.

    action: "save" to write a packed file, or "" to load a model and generate a short answer.
    """
    start = time.perf_counter()
    if action == "save":
        path = packed_file.save_packed_file(ckpt_dir, weight_format)
        return print_figures(seconds=time.perf_counter() - start, peak=peak_rss(), bytes=path.stat().st_size)
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len=512, max_batch_size=1, device="cpu", quantize=weight_format)
    seconds, args = time.perf_counter() - start, llama.model.params
    start = time.perf_counter()
    llama.tokenizer.eos_id = -2  # no token counts as EOS, so that the answer always has 8 tokens
    (tokens,), _ = llama.generate([[1, 7, 77, 777]], 8, temperature=0)
    speed = len(tokens) / (time.perf_counter() - start)
    weights = estimate.weight_bytes(args, 1, llama.model.norm.weight.dtype, weight_format)
    print_figures(seconds=seconds, peak=peak_rss(), weights=weights, speed=speed, ids=tokens)


def compare_quantized(a: argparse.Namespace, folder: Path, tokenizer_path: Path) -> None:
    """Measure and print three steps: loading from the shards, writing the packed file, and loading from the packed file."""
    packed_file.packed_file_path(folder, a.quantize).unlink(missing_ok=True)
    stored_bytes = sum(path.stat().st_size for path in folder.glob("*.pth"))
    steps = {"from the shards": "", "writing the file": "save", "from the file": ""}
    command = (Path(__file__), "--measure_quantized", folder, tokenizer_path, a.quantize)
    results = {step: run_python(*command, action, threads=2)[0] for step, action in steps.items()}
    size = f"{stored_bytes / 1e9:.2f} GB in {a.shards} shard(s)"
    print(f"{a.shape}, {size}, as {a.quantize} on one rank, CPU, torch {torch.__version__}")
    for step, figures in results.items():
        line = f"{step:17} {figures['seconds']:7.1f} s, peak {figures['peak'] / 1e9:6.2f} GB"
        if "weights" in figures:
            line += f" = {figures['peak'] / figures['weights']:.2f} times {figures['weights'] / 1e9:.2f} GB of weights"
            line += f", 8 new tokens at {figures['speed']:.1f} tokens/s: {figures['ids']}"
        print(line)
    if a.json:
        record = {"shape": a.shape, "bytes": stored_bytes, "kind": a.quantize, "found": results}
        a.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="model size; default: 1.1B")
    parser.add_argument("--runs", type=int, default=5, help="loads of each; default: 5")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint; default: a temporary one")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="measure this library alone, in 8 or 4 bit")
    parser.add_argument("--shards", type=int, default=1, help="number of shards, with --quantize; default: 1")
    parser.add_argument("--layouts", action="store_true", help="compare Meta's layout with Hugging Face's")
    parser.add_argument("--measure_layout", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure_quantized", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure:
        return measure(*a.measure)
    if a.measure_layout:
        return measure_layout(*a.measure_layout)
    if a.measure_quantized:
        return measure_quantized(*a.measure_quantized)

    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        folder, tokenizer_path = make_checkpoint(work, a.shape, a.shards), make_tokenizer(work)
        if a.layouts:
            return compare_layouts(a, folder, tokenizer_path)
        if a.quantize:
            return compare_quantized(a, folder, tokenizer_path)
        size = (folder / "consolidated.00.pth").stat().st_size
        loaders = {"reference": ("reference", 1), "ours, 1 rank": ("ours", 1), "ours, 2 ranks (each)": ("ours", 2)}
        runs: dict[str, list[dict]] = {name: [] for name in loaders}
        for _ in range(a.runs):
            for name, (loader, ranks) in loaders.items():
                warm_memory(folder / "consolidated.00.pth")
                figures = run_python(Path(__file__), "--measure", loader, folder, tokenizer_path, ranks=ranks)
                runs[name].append({key: max(rank[key] for rank in figures) for key in ("seconds", "peak")})

    print(f"{a.shape}, {size / 1e9:.2f} GB in bfloat16, CPU, torch {torch.__version__}, median of {a.runs}")
    print(f"{'':22} {'load, s':>8} {'speed-up':>9} {'peak, GB':>9} {'of the file':>12}")
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in ("seconds", "peak")} for n, rs in runs.items()}
    for name, m in medians.items():
        ratio = medians["reference"]["seconds"] / m["seconds"]
        print(f"{name:22} {m['seconds']:8.2f} {ratio:8.1f}x {m['peak'] / 1e9:9.2f} {m['peak'] / size:11.2f}x")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"shape": a.shape, "bytes": size, "torch": torch.__version__, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
