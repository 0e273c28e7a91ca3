"""Which machines hold a model, and how fast it can be there at best: computed, not measured.

A decode step reads each rank's weights once for all rows, of the embedding no more than a row for each, and the keys and
values of all positions in use. Ranks read at the same time, each from a memory of its own, and a step ends when all have:
so ids/s are at most rows * bandwidth / bytes read on one rank. What ranks send each other, and what kernels lose, comes on
top. Nothing here knows of files, or of the machine it runs on.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint.params import parse_dtype, read_params
from ..checkpoint.shards import open_shards, shard_paths
from ..errors import InputError, describe, format_bytes
from ..model import ModelArgs, check_ranks
from .estimate import cache_bytes, check_quantization, explain_oom, is_possible, matmul_bytes, memory_required

VOCAB_SIZE = 32000  # of Llama 2's vocabulary
MODELS = {
    "7B": ModelArgs(vocab_size=VOCAB_SIZE),
    "13B": ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=VOCAB_SIZE),
    "70B": ModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=VOCAB_SIZE
    ),
}
SHOWN = 16  # most ranks that a table has unasked
NOTE = "Computed, not measured: as fast as memory is read, all positions in use; what ranks send each other comes on top."


class Machine(NamedTuple):
    """What a rank runs on: memory in GB, all of it free, and how fast it is read, in GB/s."""

    name: str
    memory: float
    bandwidth: float


# As in the vendors' data sheets; from A100 on the SXM modules. A GB is taken as 10^9 bytes, though most of these have 2^30:
# the difference is about what error correction and CUDA itself take.
GPUS = {
    machine.name: machine
    for machine in (
        Machine("RTX3090", 24, 936), Machine("RTX4090", 24, 1008), Machine("RTX5090", 32, 1792),
        Machine("L4", 24, 300), Machine("A10", 24, 600), Machine("L40S", 48, 864),
        Machine("A100-40", 40, 1555), Machine("A100-80", 80, 2039),
        Machine("H100", 80, 3350), Machine("H200", 141, 4800), Machine("B200", 180, 8000),
    )
}  # fmt: skip


def choose_machines(gpu: str | None, memory: float | None, bandwidth: float | None) -> tuple[list[Machine], torch.device]:
    """The GPU named, the machine described, or all GPUs there are; and where kernels have to be found for them."""
    if memory is None and bandwidth is None:
        return [GPUS[gpu]] if gpu else list(GPUS.values()), torch.device("cuda")
    if gpu or memory is None or bandwidth is None:
        raise InputError("a machine is either a --gpu or both --memory and --bandwidth, not something of each")
    for name, value, unit in (("memory", memory, "GB"), ("bandwidth", bandwidth, "GB/s")):
        if not 0 < value <= 1e6:
            raise InputError(f"{name} is {value}; it must be a number of {unit} above 0, at most a million")
    return [Machine("a machine", memory, bandwidth)], torch.device("cpu")


def bytes_read_per_step(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> int:
    """What each rank reads in a decode step of `max_batch_size` rows when all `max_seq_len` positions are in use."""
    return matmul_bytes(args, ranks, dtype, kind) + cache_bytes(args, ranks, dtype)


def plan_report(
    name: str,
    args: ModelArgs,
    ranks: list[int],
    dtype: torch.dtype,
    kind: str | None,
    machines: list[Machine],
    device: torch.device,
) -> str:
    """A table of memory and of most ids/s: a column for each number of ranks, if none is given for all that are possible.

    Of a single machine it says, too, what would make fit what does not. Raises InputError for sizes that cannot be, and
    DeviceError, as `Llama.build` does, for a number of ranks that does not divide the model or has no kernel.
    """
    sizes = [("ranks", n) for n in ranks] + [("max_seq_len", args.max_seq_len), ("max_batch_size", args.max_batch_size)]
    for what, value in sizes:
        if not 1 <= value < 2**31:
            raise InputError(f"{what} is {value}; it must be a whole number from 1 to {2**31 - 1:,}")
    notes = [NOTE] if ranks else [NOTE, f"No other number of ranks up to {SHOWN} is possible."]
    ranks = ranks or [n for n in range(1, SHOWN + 1) if is_possible(args, n, dtype, device, kind)] or [1]
    for n in ranks:
        check_ranks(args, n)
        check_quantization(args, n, dtype, device, kind)

    needs = [memory_required(args, n, dtype, kind) for n in ranks]
    steps = [bytes_read_per_step(args, n, dtype, kind) for n in ranks]
    held_as, rows = kind or str(dtype).removeprefix("torch."), args.max_batch_size
    table: list[tuple[str, list[str]]] = [
        ("ranks", [str(n) for n in ranks]),
        ("weights, on each", [format_bytes(each.weights) for each in needs]),
        (f"cache of {rows} x {args.max_seq_len} ids", [format_bytes(each.cache) for each in needs]),
        ("to compute in", [format_bytes(each.working) for each in needs]),
        ("in all", [format_bytes(each.total) for each in needs]),
        ("read in a step", [format_bytes(n) for n in steps]),
        ("most ids/s; -: does not fit", []),
    ]
    for machine in machines:
        free, speed = int(machine.memory * 1e9), machine.bandwidth * 1e9
        missing = [explain_oom(args, n, dtype, device, free, kind, machine.name) for n in ranks]
        most = ["-" if why else f"{rows * speed / step:,.1f}" for why, step in zip(missing, steps, strict=True)]
        table.append((f"{machine.name:<10}{machine.memory:>5g} GB{machine.bandwidth:>6g} GB/s", most))
        notes += [why for why in missing if why and len(machines) == 1]
    lines = [(f"{label:<30}" + "".join(f"{cell:>12}" for cell in cells)).rstrip() for label, cells in table]
    return "\n".join([f"{name}, {held_as}", *lines, *notes])


def describe_checkpoint(ckpt_dir: str | os.PathLike[str]) -> tuple[ModelArgs, torch.dtype]:
    """A checkpoint's shape and dtype; of one that has no shards yet, as far as params.json tells."""
    params = read_params(ckpt_dir)
    if shard_paths(Path(ckpt_dir).expanduser()):
        embedding = open_shards(ckpt_dir).first.get("tok_embeddings.weight")
        if embedding is not None and embedding.ndim == 2:
            return ModelArgs(**{**params, "vocab_size": len(embedding)}), embedding.dtype
    declared = params.get("vocab_size", -1)
    return ModelArgs(**{**params, "vocab_size": VOCAB_SIZE if declared == -1 else declared}), torch.bfloat16


def plan(
    model: str | None = None,
    ckpt_dir: str | os.PathLike[str] | None = None,
    ranks: Sequence[int] = (),
    max_seq_len: int = 4096,
    max_batch_size: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
    gpu: str | None = None,
    memory: float | None = None,
    bandwidth: float | None = None,
) -> str:
    """Return a table of a model's memory on each rank, and of the tokens/s that reading it allows on some machines.

    model: one of MODELS; or ckpt_dir, a folder with params.json. ranks: columns of the table, by default all possible numbers.
    gpu: one of GPUS; or memory in GB and bandwidth in GB/s of another machine; by default all GPUs. The other arguments are
    those of `Llama.build`. Raises LlamaError for what cannot be.
    """
    if (model is None) == (ckpt_dir is None) or (model is not None and model not in MODELS):
        raise InputError(f"model is {describe(model)}; give one of {', '.join(MODELS)}, or a ckpt_dir instead")
    args, stored = (MODELS[model], torch.bfloat16) if model else describe_checkpoint(ckpt_dir)  # type: ignore[arg-type]
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    machines, device = choose_machines(gpu, memory, bandwidth)
    held_dtype = parse_dtype(dtype) or stored
    return plan_report(model or str(ckpt_dir), args, list(ranks), held_dtype, quantize, machines, device)
