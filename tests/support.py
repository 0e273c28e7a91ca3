"""Helpers of the tests: train a tokenizer, write checkpoints in Meta's layout, pack models, run commands and ranks."""

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from llama import LlamaError, Transformer
from llama.kernels.c_extension import ExtensionStatus
from llama.kernels.packed_weight import make_parameters
from llama.quantization.quantize import QUANTIZERS, quantize
from llama.quantization.weight import QuantizedWeight

ROOT = Path(__file__).parents[1]
TEXT = """The quick brown fox jumps over the lazy dog near the river. Once upon a time there was a little bear.
She sells sea shells by the sea shore, and he counts them: one, two, three, four, five, six, seven.
What is the capital of France? The capital of France is Paris. How do I get there? By train, of course!
Always answer with a short poem. I am a helpful assistant; thank you, friend. Good morning, good night."""


def train_tokenizer(path: Path, vocab_size: int = 384, normalization: str = "identity", pieces: Sequence[str] = ()) -> Path:
    """Train a SentencePiece BPE model like Llama 2's (byte fallback, BOS 1, EOS 2, no padding token); return its path."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=False,
        user_defined_symbols=list(pieces),
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


SPLIT_ROWS, SPLIT_COLUMNS = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2", "tok_embeddings")


def random_weights(params: dict, vocab: int, hidden: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random, unsharded float32 weights for every tensor of a model, scaled so that greedy answers vary."""
    g = torch.Generator().manual_seed(seed)
    dim, n_heads = params["dim"], params["n_heads"]
    kv = params.get("n_kv_heads", n_heads) * (dim // n_heads)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) * columns**-0.5

    def norm() -> torch.Tensor:
        return torch.rand(dim, generator=g) + 0.5

    weights = {"tok_embeddings.weight": torch.randn(vocab, dim, generator=g), "norm.weight": norm()}
    weights["output.weight"] = matrix(vocab, dim)
    for i in range(params["n_layers"]):
        for name, rows, columns in (
            ("attention.wq", dim, dim), ("attention.wk", kv, dim), ("attention.wv", kv, dim), ("attention.wo", dim, dim),
            ("feed_forward.w1", hidden, dim), ("feed_forward.w3", hidden, dim), ("feed_forward.w2", dim, hidden),
        ):  # fmt: skip
            weights[f"layers.{i}.{name}.weight"] = matrix(rows, columns)
        weights[f"layers.{i}.attention_norm.weight"] = norm()
        weights[f"layers.{i}.ffn_norm.weight"] = norm()
    return weights


def write_shards(folder: Path, params: dict, weights: dict[str, torch.Tensor], n_shards: int = 1) -> Path:
    """Write params.json and consolidated.NN.pth: the weights, split as Meta splits them, and the tensor rope.freqs."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(n_shards):
        tensors = {}
        for name, weight in weights.items():
            module = name.split(".")[-2]
            if module in SPLIT_ROWS + SPLIT_COLUMNS:
                weight = weight.chunk(n_shards, dim=0 if module in SPLIT_ROWS else 1)[shard]
            tensors[name] = weight.clone()
        tensors["rope.freqs"] = torch.ones(params["dim"] // params["n_heads"] // 2)
        torch.save(tensors, folder / f"consolidated.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def packed_model(model: Transformer, format: str | None, scale: float = 0.1) -> Transformer:
    """Replace the weights of the model by random weights, packed as `Llama.build` packs them.

    The weights have the model's dtype, or are quantized if `format` is "int8" or "int4".
    """

    def pack(*modules: torch.nn.Module) -> None:
        shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[union-attr, arg-type, operator]
        weight = torch.cat([torch.randn(shape, generator=generator).mul_(scale) for shape in shapes]).to(dtype)
        stored, outs = quantize(weight, format) if format else weight, [out for out, _ in shapes]
        logits = modules[0] is model.output
        for module, parameter in zip(
            modules, make_parameters(stored, outs, weight.shape[1], dtype, weight.device, computes_logits=logits), strict=True
        ):
            module.weight = parameter

    generator, dtype = torch.Generator().manual_seed(7), model.norm.weight.dtype
    for layer in model.layers:
        attention, feed_forward = layer.attention, layer.feed_forward
        pack(attention.wq, attention.wk, attention.wv)
        pack(attention.wo)
        pack(feed_forward.w1, feed_forward.w3)
        pack(feed_forward.w2)
    pack(model.output)
    return model


def quantize_int8_per_row(weight: torch.Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """Quantize a weight to int8 with one scale per row, as `quantize` does for weights on a GPU."""
    return QuantizedWeight("int8", *QUANTIZERS["int8"](weight.float().unsqueeze(1)), weight.shape[1], dtype)


def environment(**env: str) -> dict[str, str]:
    """Return the environment variables for a child process that uses the CPU and does not belong to a torchrun job."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    base = {k: v for k, v in os.environ.items() if k not in drop}
    return base | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | env


def run(*command: object, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, for 120 seconds at most; return its exit status and output."""
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment(**env), input=stdin)


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"


def torchrun(ranks: int, *command: object, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return run(*TORCHRUN, ranks, *command, stdin=stdin, **env)


def assert_raises(call: Callable[[], Any], error: type[LlamaError], *parts: str) -> None:
    """Check that the call raises this error, and that its message contains all the parts and has under 700 characters."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, LlamaError) and isinstance(caught.value, AssertionError)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [] and len(message) < 700, message


def no_extension() -> ExtensionStatus:
    """Return the status of an extension that is not compiled. Tests patch a kernel module's `status` with this function."""
    return ExtensionStatus(None, "not compiled, says this test", not_compiled=True)


class Fault(Exception):
    """An error that a test injects."""


def fail_on_call(call: Callable, nth: int) -> Callable:
    """Return a function that works like `call`, but raises Fault at the end of its n-th call."""
    times = itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if next(times) == nth:
            raise Fault
        return result

    return wrapped
