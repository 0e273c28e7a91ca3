"""Functions that the benchmarks share: write checkpoints and tokenizers with random content, and measure in new processes."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import sentencepiece
import torch

from llama import ModelArgs, Transformer
from llama.checkpoint.shards import split_dim

ROOT = Path(__file__).parents[1]
SHAPES = {  # contents of params.json for TinyLlama 1.1B, Llama 2 7B and 13B, and a tiny model for tests of the benchmarks
    "1.1B": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "7B": dict(dim=4096, n_layers=32, n_heads=32, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "13B": dict(dim=5120, n_layers=40, n_heads=40, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "tiny": dict(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
}
VOCAB_SIZE = 32000


def make_checkpoint(folder: Path, shape: str, shards: int = 1) -> Path:
    """Write a checkpoint of random bfloat16 weights, unless it exists; return the path of the checkpoint."""
    path = folder / (shape if shards == 1 else f"{shape}-{shards}")
    if not (path / "params.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = Transformer(ModelArgs(**{**SHAPES[shape], "vocab_size": VOCAB_SIZE}))
        device = "cuda" if torch.cuda.is_available() else "cpu"  # a GPU generates the random weights of 7B in seconds
        for shard in range(shards):
            generator = torch.Generator(device).manual_seed(shard)
            tensors = {}
            for name, p in model.state_dict().items():
                dim = split_dim(name)
                shard_shape = [size // shards if d == dim else size for d, size in enumerate(p.shape)]
                weight = torch.ones(shard_shape, dtype=torch.bfloat16, device=device)
                if p.ndim == 2:
                    weight.normal_(std=p.shape[1] ** -0.5, generator=generator)
                tensors[name] = weight.cpu()
            torch.save(tensors, path / f"consolidated.{shard:02d}.pth")
        (path / "params.json").write_text(json.dumps(SHAPES[shape]))
    return path


def make_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """Write a SentencePiece model of random words, unless the folder already contains one; return the path of the model.

    The benchmarks need a vocabulary of the right size; the words do not matter.
    """
    path = folder / "tokenizer.model"
    if not path.exists():
        rng, model = random.Random(0), io.BytesIO()
        words = {"".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(vocab_size + 1000)}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(words)),
            model_writer=model,
            model_type="word",
            vocab_size=vocab_size,
            pad_id=-1,
            minloglevel=2,
        )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.getvalue())
    return path


def run_python(*command: object, ranks: int = 1, threads: int = 2) -> list[dict]:
    """Run a Python command in a new process, or on several ranks with torchrun, and return what the ranks have measured.

    Each rank gets an equal part of the threads, and reports its measurements with `print_figures`.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    process = subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        capture_output=True,
        text=True,
        env=process_environment(max(1, threads // ranks)),
    )
    if process.returncode:
        raise SystemExit(process.stderr)
    return [json.loads(line) for line in process.stderr.splitlines() if line.startswith("{")]


def process_environment(threads: int) -> dict[str, str]:
    """Return the environment variables for a new process. Only OMP_NUM_THREADS and PYTHONPATH differ from the user's.

    PYTHONPATH contains llama and the benchmarks. All other variables stay, so that each library runs as its users run it.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def print_figures(**figures: object) -> None:
    """Print measurements to stderr as one line of JSON, which `run_python` reads.

    The line is written with a single system call, so that lines of several ranks do not mix.
    """
    os.write(2, (json.dumps(figures) + "\n").encode())


def peak_rss(process: int | str = "self") -> int:
    """Return the peak resident memory of a process in bytes. process: a process ID, or "self" for the calling process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("peak memory is read from /proc: this benchmark needs Linux")
