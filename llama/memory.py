"""What a model needs in memory, and whether it fits: known before anything is allocated."""

import bisect
from dataclasses import dataclass, replace

import torch

from .attention import BLOCK
from .errors import DeviceError
from .kernels import check
from .model import ModelArgs, check_ranks
from .quantize import HEAD, KINDS, bytes_per_weight

PREFILL_CHUNK = 2048  # ids of prompts in one forward: enough to fill any machine; bounds what activations take
LOGPROB_CHUNK = 512  # positions whose logits stand in memory at once
SMALLEST_WINDOW = 16  # a shorter max_seq_len is no advice
MOST_RANKS = 1024  # nor are more ranks


@dataclass(frozen=True)
class Need:
    """Bytes on each rank."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def need(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> Need:
    """What each rank holds and computes in. `kind`: of quantization."""
    return Need(weight_bytes(args, ranks, dtype, kind), cache_bytes(args, ranks, dtype), working_bytes(args, ranks, dtype))


def weight_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> int:
    """One rank's share of the weights."""
    embedding = args.vocab_size * args.dim // ranks * dtype.itemsize
    return embedding + multiplied_bytes(args, ranks, dtype, kind)


def multiplied_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> int:
    """One rank's share of all weights but the embedding: matrices are split, norms are on every rank."""
    kv_width = args.kv_heads * args.head_dim
    by_dim = 2 * args.dim * args.dim + 2 * args.dim * kv_width + 2 * args.dim * args.ffn_width  # in a layer, by their inputs
    matrices = args.n_layers * by_dim * bytes_per_weight(kind, dtype, args.dim)
    matrices += args.n_layers * args.dim * args.ffn_width * bytes_per_weight(kind, dtype, args.ffn_width)
    matrices += args.vocab_size * args.dim * bytes_per_weight(kind and HEAD, dtype, args.dim)
    norms = (2 * args.n_layers + 1) * args.dim * dtype.itemsize
    return int(matrices) // ranks + norms


def cache_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """One rank's keys and values for `max_batch_size` rows of `max_seq_len` positions."""
    per_position = 2 * args.n_layers * (args.kv_heads // ranks) * args.head_dim * dtype.itemsize
    return per_position * args.max_batch_size * args.max_seq_len


def ids_at_once(args: ModelArgs) -> int:
    """Most ids of one forward: prompts go through in chunks, but a sequence to be scored as a whole."""
    return max(PREFILL_CHUNK, args.max_seq_len)


def working_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """About what one rank computes in: activations of all ids of a forward, the scores of a block of them before and after
    softmax, logits of LOGPROB_CHUNK positions."""
    numbers = ids_at_once(args) * (8 * args.dim + (3 * args.ffn_width + 2 * BLOCK * args.n_heads) // ranks)
    return numbers * dtype.itemsize + 3 * LOGPROB_CHUNK * args.vocab_size * 4


def possible(args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, kind: str | None) -> bool:
    """Whether a model of this kind can be divided among so many ranks, and has a kernel there."""
    try:
        check_ranks(args, ranks)
        check_quantized(args, ranks, dtype, device, kind)
    except DeviceError:
        return False
    return True


def check_quantized(args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, kind: str | None) -> None:
    """Raise DeviceError where there is no kernel for a model of this kind."""
    if kind is not None:
        check(kind, device, dtype)


def preflight(
    args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, free: int | None, kind: str | None = None
) -> None:
    """Raise DeviceError if weights, cache and room to compute in exceed the `free` bytes; None: nobody knows how many."""
    if free is not None and (why := shortfall(args, ranks, dtype, device, free, kind)):
        raise DeviceError(why)


def shortfall(
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
        return need(replace(args, **sizes), ranks, dtype, kind).total  # type: ignore[arg-type]

    def most(name: str, asked: int, **sizes: int) -> int:
        """The largest number below the one asked for that fits, or 0."""
        return bisect.bisect_right(range(1, asked), free, key=lambda n: total(**sizes, **{name: n}))  # type: ignore[arg-type]

    if total() <= free:
        return None
    ways = []
    if (window := most("max_seq_len", args.max_seq_len)) >= SMALLEST_WINDOW:
        ways.append(f"max_seq_len={window}")
    if rows := most("max_batch_size", args.max_batch_size):
        ways.append(f"max_batch_size={rows}")
    if not ways and (window := most("max_seq_len", args.max_seq_len, max_batch_size=1)) >= SMALLEST_WINDOW:
        ways.append(f"max_batch_size=1 with max_seq_len={window}")
    if total(dtype=torch.bfloat16) <= free:
        ways.append(f"dtype='bfloat16' ({gb(total(dtype=torch.bfloat16))})")
    for smaller in KINDS:
        if total(kind=smaller) <= free and possible(args, ranks, dtype, device, smaller):
            ways.append(f"quantize='{smaller}' ({gb(total(kind=smaller))})")
            break
    for more in range(ranks + 1, min(args.kv_heads, MOST_RANKS) + 1):
        if total(ranks=more) <= free and possible(args, more, dtype, device, kind):
            machines = "on machines of their own" if device.type == "cpu" else "with a GPU each"
            ways.append(f"{more} ranks {machines} ({gb(total(ranks=more))} each)")
            break
    now, held_as = need(args, ranks, dtype, kind), kind or str(dtype).removeprefix("torch.")
    return (
        f"the model does not fit on {where or device}: {gb(now.weights)} of weights ({held_as}) and {gb(now.cache)} "
        f"of cache (max_seq_len={args.max_seq_len}, max_batch_size={args.max_batch_size}) on each of {ranks} rank(s), with "
        f"{gb(now.working)} to compute in, make {gb(now.total)}, but {gb(free)} are free. "
        + (f"It fits with {', or '.join(ways)}." if ways else "No change of length, rows, dtype or ranks makes it fit here.")
    )


def gb(n: int) -> str:
    """Bytes, to be read."""
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.3f} MB"
