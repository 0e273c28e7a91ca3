"""Determine which machines can hold a model, and compute an upper bound of its tokens/s on each of them.

A decode step generates one token for each row of the batch. In each step a rank reads its weights once for all rows, and the
keys and values of all positions in use. The few rows of the embedding that it reads are not counted. Ranks read at the same
time, each from its own memory. So tokens/s are at most rows * bandwidth / bytes read by one rank. Communication between ranks
and the inefficiency of kernels are not counted.
"""

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..checkpoint.layouts import read_params, stored_embedding
from ..checkpoint.params import parse_dtype
from ..errors import InputError, check_count, describe, format_bytes, short_repr
from ..kernels.packing import check_kernel
from ..model import ModelArgs, check_ranks
from ..quantization.weight import check_quantize
from .estimate import cache_bytes, explain_oom, is_possible, matmul_bytes, memory_required
from .free_memory import FreeMemory

VOCAB_SIZE = 32000  # tokens in Llama 2's vocabulary
MODELS = {
    "7B": ModelArgs(vocab_size=VOCAB_SIZE),
    "13B": ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=VOCAB_SIZE),
    "70B": ModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3, vocab_size=VOCAB_SIZE
    ),
}
MAX_RANKS_SHOWN = 16  # largest number of ranks in a table if the caller does not choose the numbers
NOTE = (
    "Computed, not measured: the bound that memory bandwidth sets when the context is full. "
    "Communication between ranks is not counted."
)


class Machine(NamedTuple):
    """The device of one rank: its memory in GB, which is assumed to be all free, and its memory bandwidth in GB/s."""

    name: str
    memory: float
    bandwidth: float


# Figures are from the vendors' data sheets. Those of the A100, H100, H200 and B200 are for SXM modules. A GB counts as 10^9
# bytes, although most of these GPUs have 2^30 bytes for each GB: error correction and CUDA use about the difference.
GPUS = {
    machine.name: machine
    for machine in (
        Machine("RTX3090", 24, 936), Machine("RTX4090", 24, 1008), Machine("RTX5090", 32, 1792),
        Machine("L4", 24, 300), Machine("A10", 24, 600), Machine("L40S", 48, 864),
        Machine("A100-40", 40, 1555), Machine("A100-80", 80, 2039),
        Machine("H100", 80, 3350), Machine("H200", 141, 4800), Machine("B200", 180, 8000),
    )
}  # fmt: skip


def model_size(model: str) -> str:
    """Return the size in the name of one of Meta's models, as in "7B" for "llama-2-7b-chat"."""
    return model.upper().removeprefix("LLAMA-2-").removesuffix("-CHAT")


def _is_key(value: object, table: Mapping[str, object]) -> bool:
    return isinstance(value, str) and value in table


def choose_machines(gpu: str | None, memory: float | None, bandwidth: float | None) -> tuple[list[Machine], torch.device]:
    """Return the machines to plan for, and a device that has the kernels of these machines.

    gpu: the name of a GPU. memory (GB), bandwidth (GB/s): those of a machine to plan for instead of `gpu`. If no argument is
    given, return all known GPUs.
    """
    if gpu is not None and not _is_key(gpu, GPUS):
        raise InputError(f"gpu is {describe(gpu)}; use one of {', '.join(GPUS)}, or give memory and bandwidth")
    if memory is None and bandwidth is None:
        return [GPUS[gpu]] if gpu else list(GPUS.values()), torch.device("cuda")
    if gpu or memory is None or bandwidth is None:
        raise InputError(
            f"gpu is {short_repr(gpu)}, memory is {memory}, bandwidth is {bandwidth}; "
            "give either gpu, or both memory and bandwidth"
        )
    for name, value, unit in (("memory", memory, "GB"), ("bandwidth", bandwidth, "GB/s")):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1e6:
            raise InputError(f"{name} is {describe(value)}; it must be a number of {unit} above 0, at most a million")
    return [Machine("a machine", memory, bandwidth)], torch.device("cpu")


def bytes_read_per_step(args: ModelArgs, ranks: int, dtype: torch.dtype, format: str | None = None) -> int:
    """Return the bytes that each rank reads in a decode step of `max_batch_size` rows with `max_seq_len` positions in use."""
    return matmul_bytes(args, ranks, dtype, format) + cache_bytes(args, ranks, dtype)


def plan_report(
    name: str,
    args: ModelArgs,
    ranks: list[int],
    dtype: torch.dtype,
    format: str | None,
    machines: list[Machine],
    device: torch.device,
) -> str:
    """Return a table of the memory that a model needs and its maximum tokens/s, with a column for each number of ranks.

    ranks: the numbers of ranks; if empty, all possible numbers up to MAX_RANKS_SHOWN.
    If there is only one machine and the model does not fit on it, the report lists changes that would make the model fit.
    Raises InputError for sizes out of range. Raises DeviceError for a number of ranks that does not divide the model, and for a
    format without a kernel on `device`.
    """
    for n in ranks:
        check_count(n, "ranks")
    check_count(args.max_seq_len, "max_seq_len")
    check_count(args.max_batch_size, "max_batch_size")
    if format is not None:
        check_kernel(format, device, dtype)
    notes = [NOTE] if ranks else [NOTE, f"No other number of ranks up to {MAX_RANKS_SHOWN} is possible."]
    ranks = ranks or [n for n in range(1, MAX_RANKS_SHOWN + 1) if is_possible(args, n, dtype, device, format)] or [1]
    for n in ranks:
        check_ranks(args, n)

    required = [memory_required(args, n, dtype, format) for n in ranks]
    bytes_read = [bytes_read_per_step(args, n, dtype, format) for n in ranks]
    stored_as, rows = format or str(dtype).removeprefix("torch."), args.max_batch_size
    table: list[tuple[str, list[str]]] = [
        ("ranks", [str(n) for n in ranks]),
        ("weights, on each rank", [format_bytes(memory.weights) for memory in required]),
        (f"KV cache, {rows} x {args.max_seq_len} tokens", [format_bytes(memory.kv_cache) for memory in required]),
        ("activations", [format_bytes(memory.activations) for memory in required]),
        ("total", [format_bytes(memory.total) for memory in required]),
        ("read per decode step", [format_bytes(n) for n in bytes_read]),
        ("at most tokens/s (-: does not fit)", []),
    ]
    for machine in machines:
        free, bytes_per_second = FreeMemory(int(machine.memory * 1e9)), machine.bandwidth * 1e9
        errors = [explain_oom(args, n, dtype, device, free, format, machine.name) for n in ranks]
        speeds = [
            "-" if error else f"{rows * bytes_per_second / n_bytes:,.1f}"
            for error, n_bytes in zip(errors, bytes_read, strict=True)
        ]
        table.append((f"{machine.name:<10}{machine.memory:>5g} GB{machine.bandwidth:>6g} GB/s", speeds))
        notes += [error for error in errors if error and len(machines) == 1]
    lines = [(f"{label:<30}" + "".join(f"{cell:>12}" for cell in cells)).rstrip() for label, cells in table]
    return "\n".join([f"{name}, {stored_as}", *lines, *notes])


def describe_checkpoint(ckpt_dir: str | os.PathLike[str]) -> tuple[ModelArgs, torch.dtype]:
    """Return a checkpoint's ModelArgs and stored dtype.

    Without shards, the dtype is assumed to be bfloat16. If params.json has no vocabulary size either, it is assumed to be Llama
    2's.
    """
    params = read_params(ckpt_dir, "give the folder of the model that was adapted; merged, an adapter takes no further memory")
    embedding = stored_embedding(ckpt_dir)
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
    """Return a table of a model's memory on each rank, and of the tokens/s that memory bandwidth allows on some machines.

    model: "7B", "13B" or "70B". ckpt_dir: a folder with params.json or config.json, instead of `model`.
    ranks: the numbers of ranks, each a column of the table; by default all possible numbers up to 16.
    gpu: the name of a GPU; by default all known GPUs.
    memory (GB), bandwidth (GB/s): those of a machine to plan for instead of `gpu`.
    The other arguments are those of `Llama.build`. Raises LlamaError for arguments that are wrong or contradict each other.
    """
    if isinstance(model, str):
        model = model_size(model)
    if (model is None) == (ckpt_dir is None) or (model is not None and not _is_key(model, MODELS)):
        raise InputError(f"model is {describe(model)}; give one of {', '.join(MODELS)}, or a ckpt_dir instead")
    check_quantize(quantize)
    args, stored_dtype = (MODELS[model], torch.bfloat16) if model else describe_checkpoint(ckpt_dir)  # type: ignore[arg-type]
    args = replace(args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    machines, device = choose_machines(gpu, memory, bandwidth)
    weights_dtype = parse_dtype(dtype) or stored_dtype
    if isinstance(ranks, str | bytes) or not isinstance(ranks, Iterable):
        raise InputError(f"ranks is {describe(ranks)}; it must be a list of numbers of ranks")
    return plan_report(model or str(ckpt_dir), args, list(ranks), weights_dtype, quantize, machines, device)
