"""What benchmarks share: checkpoints and tokenizers of real shapes, made on the spot; one fresh process per measurement."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

AS_GIVEN = dict(os.environ)  # before this library is imported, which sets some for itself: peers run as their users run them

import sentencepiece  # noqa: E402
import torch  # noqa: E402

from llama import ModelArgs, Transformer  # noqa: E402
from llama.checkpoint.shards import split_dim  # noqa: E402

ROOT = Path(__file__).parents[1]
SHAPES = {  # params.json of TinyLlama 1.1B, Llama 2 7B and 13B, and of a model that measures nothing but the benchmark itself
    "1.1B": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "7B": dict(dim=4096, n_layers=32, n_heads=32, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "13B": dict(dim=5120, n_layers=40, n_heads=40, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
    "tiny": dict(dim=256, n_layers=4, n_heads=8, n_kv_heads=4, multiple_of=256, norm_eps=1e-5, vocab_size=-1),
}
VOCAB = 32000


def checkpoint(folder: Path, shape: str, shards: int = 1) -> Path:
    """Random bfloat16 weights, written once, shard by shard; returns the folder."""
    path = folder / (shape if shards == 1 else f"{shape}-{shards}")
    if not (path / "params.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = Transformer(ModelArgs(**{**SHAPES[shape], "vocab_size": VOCAB}))
        device = "cuda" if torch.cuda.is_available() else "cpu"  # 7B in seconds, instead of minutes
        for shard in range(shards):
            g = torch.Generator(device).manual_seed(shard)
            tensors = {}
            for name, p in model.state_dict().items():
                dim = split_dim(name)
                part = [size // shards if d == dim else size for d, size in enumerate(p.shape)]
                weight = torch.ones(part, dtype=torch.bfloat16, device=device)
                tensors[name] = (weight.normal_(std=p.shape[1] ** -0.5, generator=g) if p.ndim == 2 else weight).cpu()
            torch.save(tensors, path / f"consolidated.{shard:02d}.pth")
        (path / "params.json").write_text(json.dumps(SHAPES[shape]))
    return path


def tokenizer(folder: Path, pieces: int = VOCAB) -> Path:
    """A SentencePiece model of made-up words: the size counts here, not the text."""
    path = folder / "tokenizer.model"
    if not path.exists():
        draw, model = random.Random(0), io.BytesIO()
        words = {"".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(pieces + 1000)}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted(words)),
            model_writer=model,
            model_type="word",
            vocab_size=pieces,
            pad_id=-1,
            minloglevel=2,
        )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.getvalue())
    return path


def fresh(*command: object, ranks: int = 1, threads: int = 2) -> list[dict]:
    """Run a python command in its own process or ranks; returns the JSON objects it printed on stderr, one per rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment(max(1, threads // ranks)),
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def environment(threads: int) -> dict[str, str]:
    """For a process to be measured: it can import this library and the modules beside this file, and has so many threads."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), *filter(None, [AS_GIVEN.get("PYTHONPATH")])])
    return AS_GIVEN | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def report(**figures: object) -> None:
    """Print for `fresh`, in one write, so that ranks do not interleave."""
    os.write(2, (json.dumps(figures) + "\n").encode())


def peak_rss(process: int | str = "self") -> int:
    """The most resident memory this process, or the one with this id, has had, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("peak memory is read from /proc: this benchmark needs Linux")
