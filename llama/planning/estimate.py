"""Compute the memory that a model needs on each rank, and explain why a model does not fit, before allocating anything."""

import bisect
from dataclasses import dataclass, replace

import torch

from .. import tuning
from ..errors import DeviceError, format_bytes
from ..kernels.packing import check_kernel
from ..model import ModelArgs, check_ranks
from ..quantization.weight import FORMATS, OUTPUT_FORMAT, bytes_per_weight
from .free_memory import FreeMemory

MIN_SUGGESTED_LENGTH = 16  # no error suggests a shorter max_seq_len than this, as it would be of no use
MAX_SUGGESTED_RANKS = 1024


@dataclass(frozen=True)
class MemoryRequired:
    """The memory that a model needs on each rank, in bytes."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


def memory_required(args: ModelArgs, ranks: int, dtype: torch.dtype, format: str | None = None) -> MemoryRequired:
    """Return the memory that a model needs on each rank.

    format: "int8" or "int4" if the matrices are quantized; None if they are not.
    """
    return MemoryRequired(
        weight_bytes(args, ranks, dtype, format), cache_bytes(args, ranks, dtype), activation_bytes(args, ranks, dtype)
    )


def weight_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype, format: str | None = None) -> int:
    """Return the bytes of one rank's part of the weights."""
    embedding = args.vocab_size * args.dim // ranks * dtype.itemsize
    return embedding + matmul_bytes(args, ranks, dtype, format)


def matmul_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype, format: str | None = None) -> int:
    """Return the bytes of one rank's weights without the embedding: the rank's part of each matrix, and all norms."""
    queries, kv_width = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
    # The number of inputs that share a scale depends on the number of inputs of the matrix: `ffn_width` in w2, `queries` in wo,
    # `dim` in all other matrices.
    dim_inputs = args.dim * queries + 2 * args.dim * kv_width + 2 * args.dim * args.ffn_width
    matrices = args.n_layers * dim_inputs * bytes_per_weight(format, dtype, args.dim)
    matrices += args.n_layers * args.dim * queries * bytes_per_weight(format, dtype, queries)
    matrices += args.n_layers * args.dim * args.ffn_width * bytes_per_weight(format, dtype, args.ffn_width)
    matrices += args.vocab_size * args.dim * bytes_per_weight(format and OUTPUT_FORMAT, dtype, args.dim)
    norms = (2 * args.n_layers + 1) * args.dim * dtype.itemsize
    return int(matrices) // ranks + norms


def cache_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """Return the bytes of one rank's KV cache: `max_batch_size` rows of `max_seq_len` positions."""
    per_position = 2 * args.n_layers * (args.kv_heads // ranks) * args.head_dim * dtype.itemsize
    return per_position * args.max_batch_size * args.max_seq_len


def max_tokens_per_forward(args: ModelArgs) -> int:
    """Return the largest number of tokens in one forward pass.

    Prompts are prefilled in chunks, but a sequence to score is computed whole.
    """
    return max(tuning.PREFILL_CHUNK, args.max_seq_len)


def activation_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """Estimate the bytes of one rank's activations in the largest forward pass.

    The estimate includes the hidden states of all tokens, the attention scores of ATTENTION_CHUNK queries before and after
    softmax, and the logits of LOGPROB_CHUNK positions.
    """
    values = max_tokens_per_forward(args) * (
        8 * args.dim + (3 * args.ffn_width + 2 * tuning.ATTENTION_CHUNK * args.n_heads) // ranks
    )
    return values * dtype.itemsize + 3 * tuning.LOGPROB_CHUNK * args.vocab_size * 4


def is_possible(args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, format: str | None) -> bool:
    """Return True if the model can be divided among `ranks` ranks, and the device has a kernel for `format`."""
    try:
        check_ranks(args, ranks)
        if format is not None:
            check_kernel(format, device, dtype)
    except DeviceError:
        return False
    return True


def check_memory(
    args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, free: FreeMemory | None, format: str | None = None
) -> None:
    """Raise DeviceError if a model needs more memory on each rank than is free. With free=None, check nothing."""
    if free is not None and (error := explain_oom(args, ranks, dtype, device, free, format)):
        raise DeviceError(error)


def explain_oom(
    args: ModelArgs,
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    free: FreeMemory,
    format: str | None = None,
    device_name: str | None = None,
) -> str | None:
    """Return an error message if a model needs more memory on each rank than is free; return None if the model fits.

    The message lists changes, each of which alone makes the model fit.
    device_name: the name of the device in the message, by default that of `device`.
    """
    required = memory_required(args, ranks, dtype, format)
    if required.total <= free.bytes:
        return None
    stored_as = format or str(dtype).removeprefix("torch.")
    changes = _changes_that_fit(args, ranks, dtype, device, free, format)
    limit = f" within {free.limit}" if free.limit else ""
    return (
        f"the model does not fit on {device_name or device}: each of {ranks} rank(s) needs {format_bytes(required.total)}, but "
        f"{format_bytes(free.bytes)} are free{limit}. Weights in {stored_as} take {format_bytes(required.weights)}, the KV "
        f"cache (max_seq_len={args.max_seq_len}, max_batch_size={args.max_batch_size}) {format_bytes(required.kv_cache)}, "
        f"activations {format_bytes(required.activations)}. "
        + (
            f"It fits with {', or '.join(changes)}."
            if changes
            else "No single change of max_seq_len, max_batch_size, dtype, quantize or the number of ranks makes it fit."
        )
    )


def _changes_that_fit(
    args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, free: FreeMemory, format: str | None
) -> list[str]:
    """Return changes to a model that does not fit, as texts for an error.

    Each change alone makes the model fit.
    """
    # With another dtype, format or number of ranks, weights may no longer stay in the mapped checkpoint.
    if_copied = free.bytes if free.if_copied is None else free.if_copied

    def total(ranks: int = ranks, dtype: torch.dtype = dtype, format: str | None = format, **sizes: int) -> int:
        return memory_required(replace(args, **sizes), ranks, dtype, format).total  # type: ignore[arg-type]

    def largest_fitting(name: str, limit: int, **sizes: int) -> int:
        """Return the largest value below `limit` of the field `name` of ModelArgs with which the model fits.

        Returns 0 if the model fits with no value.
        """
        return bisect.bisect_right(range(1, limit), free.bytes, key=lambda n: total(**sizes, **{name: n}))  # type: ignore[arg-type]

    changes = []
    if (length := largest_fitting("max_seq_len", args.max_seq_len)) >= MIN_SUGGESTED_LENGTH:
        changes.append(f"max_seq_len={length}")
    if rows := largest_fitting("max_batch_size", args.max_batch_size):
        changes.append(f"max_batch_size={rows}")
    if not changes and (length := largest_fitting("max_seq_len", args.max_seq_len, max_batch_size=1)) >= MIN_SUGGESTED_LENGTH:
        changes.append(f"max_batch_size=1 with max_seq_len={length}")
    if total(dtype=torch.bfloat16) <= if_copied:
        changes.append(f"dtype='bfloat16' ({format_bytes(total(dtype=torch.bfloat16))})")
    for smaller in FORMATS:
        if total(format=smaller) <= if_copied and is_possible(args, ranks, dtype, device, smaller):
            changes.append(f"quantize='{smaller}' ({format_bytes(total(format=smaller))})")
            break
    for n in range(ranks + 1, min(args.kv_heads, MAX_SUGGESTED_RANKS) + 1):
        if total(ranks=n) <= if_copied and is_possible(args, n, dtype, device, format):
            machines = "on separate machines" if device.type == "cpu" else "with a GPU each"
            changes.append(f"{n} ranks {machines} ({format_bytes(total(ranks=n))} each)")
            break
    return changes
