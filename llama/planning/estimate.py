"""What a model needs in memory, and whether it fits: known before anything is allocated."""

import bisect
from dataclasses import dataclass, replace

import torch

from .. import tuning
from ..errors import DeviceError, format_bytes
from ..kernels.packing import check_kernel
from ..model import ModelArgs, check_ranks
from ..quantization.weight import FORMATS, OUTPUT_FORMAT, bytes_per_weight

MIN_SUGGESTED_LENGTH = 16  # a shorter max_seq_len is no advice
MAX_SUGGESTED_RANKS = 1024  # nor are more ranks


@dataclass(frozen=True)
class MemoryRequired:
    """Bytes on each rank."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def memory_required(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> MemoryRequired:
    """What each rank holds and computes in. `kind`: of quantization."""
    return MemoryRequired(
        weight_bytes(args, ranks, dtype, kind), cache_bytes(args, ranks, dtype), activation_bytes(args, ranks, dtype)
    )


def weight_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> int:
    """One rank's share of the weights."""
    embedding = args.vocab_size * args.dim // ranks * dtype.itemsize
    return embedding + matmul_bytes(args, ranks, dtype, kind)


def matmul_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> int:
    """One rank's share of all weights but the embedding: matrices are split, norms are on every rank."""
    kv_width = args.kv_heads * args.head_dim
    by_dim = 2 * args.dim * args.dim + 2 * args.dim * kv_width + 2 * args.dim * args.ffn_width  # in a layer, by their inputs
    matrices = args.n_layers * by_dim * bytes_per_weight(kind, dtype, args.dim)
    matrices += args.n_layers * args.dim * args.ffn_width * bytes_per_weight(kind, dtype, args.ffn_width)
    matrices += args.vocab_size * args.dim * bytes_per_weight(kind and OUTPUT_FORMAT, dtype, args.dim)
    norms = (2 * args.n_layers + 1) * args.dim * dtype.itemsize
    return int(matrices) // ranks + norms


def cache_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """One rank's keys and values for `max_batch_size` rows of `max_seq_len` positions."""
    per_position = 2 * args.n_layers * (args.kv_heads // ranks) * args.head_dim * dtype.itemsize
    return per_position * args.max_batch_size * args.max_seq_len


def max_tokens_per_forward(args: ModelArgs) -> int:
    """Most ids of one forward: prompts go through in chunks, but a sequence to be scored as a whole."""
    return max(tuning.PREFILL_CHUNK, args.max_seq_len)


def activation_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """About what one rank computes in: activations of all ids of a forward, the scores of a block of them before and after
    softmax, logits of LOGPROB_CHUNK positions."""
    numbers = max_tokens_per_forward(args) * (
        8 * args.dim + (3 * args.ffn_width + 2 * tuning.ATTENTION_CHUNK * args.n_heads) // ranks
    )
    return numbers * dtype.itemsize + 3 * tuning.LOGPROB_CHUNK * args.vocab_size * 4


def is_possible(args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, kind: str | None) -> bool:
    """Whether a model of this kind can be divided among so many ranks, and has a kernel there."""
    try:
        check_ranks(args, ranks)
        check_quantization(args, ranks, dtype, device, kind)
    except DeviceError:
        return False
    return True


def check_quantization(args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, kind: str | None) -> None:
    """Raise DeviceError where there is no kernel for a model of this kind."""
    if kind is not None:
        check_kernel(kind, device, dtype)


def check_memory(
    args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, free: int | None, kind: str | None = None
) -> None:
    """Raise DeviceError if weights, cache and room to compute in exceed the `free` bytes; None: nobody knows how many."""
    if free is not None and (why := explain_oom(args, ranks, dtype, device, free, kind)):
        raise DeviceError(why)


def explain_oom(
    args: ModelArgs,
    ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    free: int,
    kind: str | None = None,
    where: str | None = None,
) -> str | None:
    """Why a model does not fit into the `free` bytes of each rank, and which single change would make it fit; None if it does.

    where: the device's name, if not its own.
    """

    def total(ranks: int = ranks, dtype: torch.dtype = dtype, kind: str | None = kind, **sizes: int) -> int:
        return memory_required(replace(args, **sizes), ranks, dtype, kind).total  # type: ignore[arg-type]

    def most(name: str, asked: int, **sizes: int) -> int:
        """The largest number below the one asked for that fits, or 0."""
        return bisect.bisect_right(range(1, asked), free, key=lambda n: total(**sizes, **{name: n}))  # type: ignore[arg-type]

    if total() <= free:
        return None
    ways = []
    if (window := most("max_seq_len", args.max_seq_len)) >= MIN_SUGGESTED_LENGTH:
        ways.append(f"max_seq_len={window}")
    if rows := most("max_batch_size", args.max_batch_size):
        ways.append(f"max_batch_size={rows}")
    if not ways and (window := most("max_seq_len", args.max_seq_len, max_batch_size=1)) >= MIN_SUGGESTED_LENGTH:
        ways.append(f"max_batch_size=1 with max_seq_len={window}")
    if total(dtype=torch.bfloat16) <= free:
        ways.append(f"dtype='bfloat16' ({format_bytes(total(dtype=torch.bfloat16))})")
    for smaller in FORMATS:
        if total(kind=smaller) <= free and is_possible(args, ranks, dtype, device, smaller):
            ways.append(f"quantize='{smaller}' ({format_bytes(total(kind=smaller))})")
            break
    for more in range(ranks + 1, min(args.kv_heads, MAX_SUGGESTED_RANKS) + 1):
        if total(ranks=more) <= free and is_possible(args, more, dtype, device, kind):
            machines = "on machines of their own" if device.type == "cpu" else "with a GPU each"
            ways.append(f"{more} ranks {machines} ({format_bytes(total(ranks=more))} each)")
            break
    now, held_as = memory_required(args, ranks, dtype, kind), kind or str(dtype).removeprefix("torch.")
    return (
        f"the model does not fit on {where or device}: {format_bytes(now.weights)} of weights ({held_as}) and {format_bytes(now.cache)} "
        f"of cache (max_seq_len={args.max_seq_len}, max_batch_size={args.max_batch_size}) on each of {ranks} rank(s), with "
        f"{format_bytes(now.working)} to compute in, make {format_bytes(now.total)}, but {format_bytes(free)} are free. "
        + (f"It fits with {', or '.join(ways)}." if ways else "No change of length, rows, dtype or ranks makes it fit here.")
    )
