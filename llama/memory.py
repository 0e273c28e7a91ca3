"""What a model needs in memory, and whether it fits: known before anything is allocated."""

import torch

from .errors import DeviceError
from .kernels import check
from .model import ModelArgs, ffn_width
from .quantize import HEAD, KINDS, bytes_per_weight, check_width

PREFILL_CHUNK = 2048  # ids of prompts in one forward: enough to fill any machine; bounds what activations take
LOGPROB_CHUNK = 512  # positions whose logits stand in memory at once
SMALLEST_WINDOW = 16  # a shorter max_seq_len is no advice


def weight_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype, kind: str | None = None) -> int:
    """One rank's share of the weights: matrices are split, norms are on every rank. `kind`: of quantization."""
    kv_width = args.kv_heads * args.head_dim
    width = ffn_width(4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
    layer = 2 * args.dim * args.dim + 2 * args.dim * kv_width + 3 * args.dim * width
    embedding = args.vocab_size * args.dim
    matrices = args.n_layers * layer * bytes_per_weight(kind, dtype) + embedding * bytes_per_weight(kind and HEAD, dtype)
    norms = (2 * args.n_layers + 1) * args.dim * dtype.itemsize
    return int(embedding * dtype.itemsize + matrices) // ranks + norms


def cache_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """One rank's keys and values for `max_batch_size` rows of `max_seq_len` positions."""
    per_position = 2 * args.n_layers * (args.kv_heads // ranks) * args.head_dim * dtype.itemsize
    return per_position * args.max_batch_size * args.max_seq_len


def working_bytes(args: ModelArgs, ranks: int, dtype: torch.dtype) -> int:
    """About what one rank computes in: activations of PREFILL_CHUNK ids, logits of LOGPROB_CHUNK positions."""
    width = ffn_width(4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
    activations = PREFILL_CHUNK * (8 * args.dim + 3 * width // ranks) * dtype.itemsize
    return activations + 3 * LOGPROB_CHUNK * args.vocab_size * 4


def possible(args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, kind: str | None) -> bool:
    """Whether there is a kernel for a model of this kind, on so many ranks."""
    try:
        check_quantized(args, ranks, dtype, device, kind)
    except DeviceError:
        return False
    return True


def check_quantized(args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, kind: str | None) -> None:
    """Raise DeviceError where there is no kernel for a model of this kind, or a rank's part cannot be quantized."""
    if kind is not None:
        check(kind, device, dtype)
        check_width("feed_forward.w2", ffn_width(4 * args.dim, args.multiple_of, args.ffn_dim_multiplier), kind, ranks)
        check_width("attention.wo", args.dim, kind, ranks)


def preflight(
    args: ModelArgs, ranks: int, dtype: torch.dtype, device: torch.device, free: int | None, kind: str | None = None
) -> None:
    """Raise DeviceError if all this exceeds the `free` bytes, saying which single change would make it fit."""

    def need(ranks: int = ranks, dtype: torch.dtype = dtype, kind: str | None = kind) -> int:
        return weight_bytes(args, ranks, dtype, kind) + cache_bytes(args, ranks, dtype) + working_bytes(args, ranks, dtype)

    if free is None or need() <= free:
        return
    weights, cache = weight_bytes(args, ranks, dtype, kind), cache_bytes(args, ranks, dtype)
    room, ways = max(free - weights - working_bytes(args, ranks, dtype), 0), []
    window = room * args.max_seq_len // cache
    rows = room * args.max_batch_size // cache
    window_of_one = room * args.max_seq_len * args.max_batch_size // cache
    if window >= SMALLEST_WINDOW:
        ways.append(f"max_seq_len={window}")
    if rows >= 1:
        ways.append(f"max_batch_size={rows}")
    if not ways and window_of_one >= SMALLEST_WINDOW:
        ways.append(f"max_batch_size=1 with max_seq_len={window_of_one}")
    if dtype.itemsize > 2 and need(dtype=torch.bfloat16) <= free:
        ways.append(f"dtype='bfloat16' ({gb(need(dtype=torch.bfloat16))})")
    for smaller in list(KINDS)[list(KINDS).index(kind) + 1 if kind else 0 :]:
        if need(kind=smaller) <= free and possible(args, ranks, dtype, device, smaller):
            ways.append(f"quantize='{smaller}' ({gb(need(kind=smaller))})")
            break
    width = ffn_width(4 * args.dim, args.multiple_of, args.ffn_dim_multiplier)
    for more in range(ranks + 1, args.kv_heads + 1):
        divides = not (args.kv_heads % more or args.vocab_size % more or width % more)
        if divides and need(ranks=more) <= free and possible(args, more, dtype, device, kind):
            where = "on machines of their own" if device.type == "cpu" else "with a GPU each"
            ways.append(f"{more} ranks {where} ({gb(need(ranks=more))} each)")
            break
    held_as = kind or str(dtype).removeprefix("torch.")
    raise DeviceError(
        f"the model does not fit on {device}: {gb(weights)} of weights ({held_as}) and {gb(cache)} "
        f"of cache (max_seq_len={args.max_seq_len}, max_batch_size={args.max_batch_size}) on each of {ranks} rank(s), with "
        f"{gb(working_bytes(args, ranks, dtype))} to compute in, make {gb(need())}, but {gb(free)} are free. "
        + (f"It fits with {', or '.join(ways)}." if ways else "No change of length, rows, dtype or ranks makes it fit here.")
    )


def gb(n: int) -> str:
    """Bytes, to be read."""
    return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e6:.3f} MB"
