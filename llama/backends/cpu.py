"""The cpu backend: run a whole decode step in one call of compiled C (csrc/decode_avx512.c) where possible.

The single call needs a CPU with AVX-512 instructions for bfloat16, a single rank, and a model in float32 or bfloat16. A model
in bfloat16 may have int8 or int4 weights. In all other cases the backend runs layer by layer. A decode step reads all weights,
which evicts everything else from the CPU's caches, so that Python code between two matrix products is slow; a single call runs
none.
"""

import functools
import itertools
import platform
import sys

import torch

from ..engine.backend import DecodeFn, DecodeRunsFn
from ..engine.forward import EngineForward, MergedLinear
from ..engine.kv_cache import RaggedBatch
from ..kernels import avx2, avx512, c_extension
from ..kernels.blocked_linear import TILE_ROWS, BlockedLinear
from ..kernels.c_extension import DTYPE_CODES, FP32, LinearArgs, fill_struct
from ..model import ModelArgs
from .layerwise import TorchBackend, decode_layerwise, decode_runs_layerwise

MAX_FUSED_STEPS = 16  # fused steps of different numbers of tokens that are kept, because each allocates memory
DTYPES = torch.bfloat16, torch.float32  # a model that runs the compiled decode step has one of these dtypes


def why_shape_unsupported(args: ModelArgs, dtype: torch.dtype, ranks: int) -> str | None:
    """Return what rules out a decode step in one call of C: the CPU, or sizes, dtype or ranks of a model; None if nothing does.

    ranks: number of ranks that share the model.
    """
    if avx512.extension() is None:
        return f"the compiled decode step needs AVX-512 with bfloat16: {avx512.status().reason}"
    if dtype not in DTYPES:
        return f"the compiled decode step needs bfloat16 or float32, and the model is in {str(dtype).removeprefix('torch.')}"
    if ranks > 1:
        return f"the compiled decode step needs one rank, and there are {ranks}"
    return why_width_unsupported(args)


def why_width_unsupported(args: ModelArgs) -> str | None:
    """Return which width of a model the C code for decode steps does not support; None if it supports all of them."""
    for name, width, unit in (
        ("dim", args.dim, 32),
        ("head_dim", args.head_dim, 32),
        ("feed-forward width", args.ffn_width, 64),
    ):
        if width % unit:
            return f"the compiled decode step needs a {name} that is a multiple of {unit}, and this one is {width}"
    return None


def why_unsupported(forward: EngineForward) -> str | None:
    """Return why a model, with its present weights, cannot run a decode step in one call of C; None if it can."""
    args = forward.model.params
    if why := why_shape_unsupported(args, forward.dtype, forward.ranks):
        return why
    inner, width = args.n_heads * args.head_dim, args.ffn_width
    sizes = [(args.dim, inner + 2 * args.kv_heads * args.head_dim), (inner, args.dim), (args.dim, 2 * width), (width, args.dim)]
    for layer in forward.layers:
        products = layer.wqkv, layer.wo, layer.w13, layer.w2
        if forward.dtype == torch.float32:
            if not all(_plain_parts(product, *size) for product, size in zip(products, sizes, strict=True)):
                return "a matrix is not plain float32: quantized, or replaced"
        elif not all(_is_blocked(product, *size) for product, size in zip(products, sizes, strict=True)):
            return "a matrix is not packed in bfloat16, 8 or 4 bit: too small, or replaced"
    norms = [norm.weight for layer in forward.layers for norm in (layer.attention_norm, layer.ffn_norm)]
    alike = all(norm.is_contiguous() and norm.dtype == forward.dtype for norm in norms)
    if not alike or not c_extension.is_plain_tensor(*norms):
        return f"a norm's weight is not a plain row in {str(forward.dtype).removeprefix('torch.')}"
    return None


def _is_blocked(product: MergedLinear, in_features: int, out_features: int) -> bool:
    """Return True if the C code can read a weight in its present layout, without conversion."""
    kernel = product.kernel
    if not isinstance(kernel, BlockedLinear) or kernel.extension.name != avx512.NAME or any(kernel.padding):
        return False
    fits = (kernel.in_features, kernel.out_features) == (in_features, out_features)
    return fits and kernel.dtype == kernel.out_dtype == torch.bfloat16  # a caller may have converted a layer to float32


def _plain_parts(product: MergedLinear, in_features: int, out_features: int) -> list[torch.Tensor]:
    """Return the plain float32 weights (rows, in_features) of a linear layer: 1 to 3, with out_features rows in total.

    The list is empty if the C code cannot read them in their present layout.
    """
    parts = [part.weight for part in product.parts or [product] if part.weight is not None]
    fits = all(w.dtype == torch.float32 and w.shape[1:] == (in_features,) and w.is_contiguous() for w in parts)
    fits = fits and all(len(w) % 16 == 0 for w in parts) and sum(map(len, parts)) == out_features
    return parts if fits and c_extension.is_plain_tensor(*parts) else []


def _linear_args(product: MergedLinear, rows: int, in_features: int, out_features: int, **fields: object) -> LinearArgs:
    """Return the C struct for multiplying `rows` rows by blocked or plain float32 weights. fields: its other fields."""
    if isinstance(product.kernel, BlockedLinear):
        return product.kernel.args(rows, **fields)
    parts = _plain_parts(product, in_features, out_features)
    memory = {"parts": tuple(w.data_ptr() for w in parts), "ends": tuple(itertools.accumulate(map(len, parts)))}
    codes = {"format": FP32, "x_dtype": FP32, "y_dtype": FP32, "int8_per_activation": 1}
    return fill_struct(LinearArgs(), n=rows, in_=in_features, **{"out": out_features, **memory, **codes, **fields})


class FusedDecodeStep:
    """Compute what `EngineForward.hidden_states` computes for a decode step of `n_tokens` tokens, but in one call of C.

    Tokens of the same row must be adjacent and in order. An instance uses the weights and the KV cache that the model has when
    the instance is created.
    """

    def __init__(self, forward: EngineForward, n_tokens: int) -> None:
        args, B = forward.model.params, n_tokens
        K, G, hd = args.kv_heads, args.n_heads // args.kv_heads, args.head_dim
        dim, inner, width = args.dim, G * K * hd, args.ffn_width

        def buffer(*shape: int, dtype: torch.dtype = forward.dtype) -> torch.Tensor:
            return torch.empty(B, *shape, dtype=dtype, device="cpu")

        self.forward, self.h = forward, buffer(dim)
        self.rotations, self.rows_and_positions = buffer(hd, dtype=torch.float32), buffer(2, dtype=torch.int64)
        qkv, attended, gated, normed = buffer((G + 2) * K, hd), buffer(inner), buffer(width), buffer(dim)
        # 3 bytes per input: enough for rows in int8, with scales and sums, and for rows in bfloat16, in tiles of 16 rows.
        rows = -(-B // TILE_ROWS) * TILE_ROWS
        scratch = {"normed": normed, "scratch": torch.empty(rows, 3 * max(dim, inner, width), dtype=torch.uint8, device="cpu")}
        linears = []
        for layer in forward.layers:
            norm, ffn_norm = ({"norm": norm.weight, "eps": norm.eps} for norm in (layer.attention_norm, layer.ffn_norm))
            linears += [
                _linear_args(layer.wqkv, B, dim, (G + 2) * K * hd, x=self.h, y=qkv, **norm, **scratch),
                _linear_args(layer.wo, B, inner, dim, x=attended, y=self.h, residual=self.h, **scratch),
                _linear_args(layer.w13, B, dim, 2 * width, x=self.h, y=gated, gated=1, out=width, **ffn_norm, **scratch),
                _linear_args(layer.w2, B, width, dim, x=gated, y=self.h, residual=self.h, **scratch),
            ]
        self.buffers = scratch, qkv, attended, gated  # keeps the tensors alive: the C structs contain only their addresses
        self.linears = (LinearArgs * len(linears))(*linears)
        data = forward.cache.data
        assert data.dtype == forward.dtype and data.is_contiguous()
        assert (len(data) * 4, data.shape[3], data.shape[5]) == (len(linears), K, hd)
        self.scores = torch.empty(B * K * G, data.shape[4], dtype=torch.float32, device="cpu")
        sizes = {"n": B, "K": K, "G": G, "hd": hd, "max_seq_len": data.shape[4], "dtype": DTYPE_CODES[data.dtype]}
        strides = {"q_stride": (G + 2) * K * hd, "row_stride": data.stride(2), "head_stride": data.stride(3)}
        tensors = {
            "q": qkv, "rotations": self.rotations, "rows_and_positions": self.rows_and_positions,
            "scores": self.scores, "y": attended,
        }  # fmt: skip
        attentions = (
            fill_struct(avx512.AttentionArgs(), keys=keys, values=values, **tensors, **sizes, **strides)
            for keys, values in data
        )
        self.attentions = (avx512.AttentionArgs * len(data))(*attentions)

    def __call__(self, tokens: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        forward = self.forward
        n_rows, max_seq_len = forward.cache.data.shape[2], forward.cache.data.shape[4]
        assert all(s.kv_len <= max_seq_len and s.row + s.n_rows <= n_rows for s in batch.segments)
        assert len(tokens) == len(self.h)
        self.h.copy_(forward.model.tok_embeddings.embed(tokens, forward.embedding))
        self.rotations.copy_(forward.freqs[batch.positions].view_as(self.rotations))
        self.rows_and_positions.copy_(torch.stack((batch.rows, batch.positions), 1))
        avx512.call("decode_layers", self.linears, self.attentions, len(self.attentions))
        return forward.norm.forward(self.h)


class CpuBackend(TorchBackend):
    """Decode with compiled C: a whole step in one call if the model allows it, otherwise layer by layer."""

    name = "cpu"

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it is for CPUs, and the device is {device}"
        return why_no_compiled_kernels()

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        hidden = forward.hidden_states if why_unsupported(forward) else FusedDecodeStep(forward, n_rows)
        return functools.partial(decode_layerwise, forward, hidden)

    def begin_runs(self, forward: EngineForward) -> DecodeRunsFn:
        if why_unsupported(forward):
            return super().begin_runs(forward)
        steps = functools.lru_cache(MAX_FUSED_STEPS)(functools.partial(FusedDecodeStep, forward))
        return functools.partial(decode_runs_layerwise, forward, steps)


def why_no_compiled_kernels() -> str | None:
    """Return why this machine has no compiled kernels, and how to get them; None if it has compiled kernels."""
    if avx512.extension() is not None or avx2.extension() is not None:
        return None
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"the compiled kernels are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    return avx2.status().reason
