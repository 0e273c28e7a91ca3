"""The cpu backend: run a whole decode step in one call of compiled C (csrc/decode_avx512.c) where possible.

The single call needs a CPU with AVX-512 instructions for bfloat16, a bfloat16 model, and a single rank. In all other cases the
backend runs layer by layer. A decode step reads all weights, which evicts everything else from the CPU's caches, so that Python
code between two matrix products is slow. A single call runs no Python code between them.
"""

import functools
import platform
import sys

import torch

from ..engine.backend import DecodeFn
from ..engine.forward import EngineForward, MergedLinear
from ..engine.kv_cache import RaggedBatch
from ..kernels import avx2, avx512, c_extension
from ..kernels.blocked_linear import BlockedLinear
from ..kernels.c_extension import fill_struct
from ..model import ModelArgs
from .layerwise import TorchBackend, decode_layerwise


def why_shape_unsupported(args: ModelArgs, dtype: torch.dtype, ranks: int) -> str | None:
    """Return why a model cannot run a decode step in one call of C because of its sizes, dtype or ranks; None if it can.

    ranks: number of ranks that share the model.
    """
    if avx512.extension() is None:
        return f"the compiled decode step needs AVX-512 with bfloat16: {avx512.status().reason}"
    if dtype != torch.bfloat16:
        return f"the compiled decode step needs bfloat16, and the model is in {str(dtype).removeprefix('torch.')}"
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
        if not all(_is_blocked(product, *size) for product, size in zip(products, sizes, strict=True)):
            return "a matrix is not packed in bfloat16, 8 or 4 bit: too small, or replaced"
    norms = [norm.weight for layer in forward.layers for norm in (layer.attention_norm, layer.ffn_norm)]
    if not all(norm.is_contiguous() for norm in norms) or not avx512.is_plain_bf16(*norms):
        return "a norm's weight is not a plain row in bfloat16"
    return None


def _is_blocked(product: MergedLinear, in_features: int, out_features: int) -> bool:
    """Return True if the C code can read a weight in its present layout, without conversion."""
    kernel = product.kernel
    if not isinstance(kernel, BlockedLinear) or kernel.extension is not avx512.extension() or any(kernel.padding):
        return False
    fits = (kernel.in_features, kernel.out_features) == (in_features, out_features)
    return fits and kernel.dtype == kernel.out_dtype == torch.bfloat16  # a caller may have converted a layer to float32


def _blocked_kernel(product: MergedLinear) -> BlockedLinear:
    assert isinstance(product.kernel, BlockedLinear)
    return product.kernel


class FusedDecodeStep:
    """Compute the hidden states of a decode step of `n_rows` rows in one call of C, like `EngineForward.hidden_states`.

    An instance uses the weights and the KV cache that the model has when the instance is created.
    """

    def __init__(self, forward: EngineForward, n_rows: int) -> None:
        args, B = forward.model.params, n_rows
        K, G, hd = args.kv_heads, args.n_heads // args.kv_heads, args.head_dim
        dim, inner, width = args.dim, G * K * hd, args.ffn_width

        def room(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(B, *shape, dtype=dtype, device="cpu")

        self.forward, self.h, self.turns, self.at = (
            forward,
            room(dim),
            room(hd, dtype=torch.float32),
            room(2, dtype=torch.int64),
        )
        heads, y, z, normed = room((G + 2) * K, hd), room(inner), room(width), room(dim)
        rows = {"normed": normed, "scratch": room(3 * max(dim, inner, width), dtype=torch.uint8)}
        products = []
        for layer in forward.layers:
            first, second = ({"norm": norm.weight, "eps": norm.eps} for norm in (layer.attention_norm, layer.ffn_norm))
            products += [
                _blocked_kernel(layer.wqkv).args(B, x=self.h, y=heads, **first, **rows),
                _blocked_kernel(layer.wo).args(B, x=y, y=self.h, residual=self.h, **rows),
                _blocked_kernel(layer.w13).args(B, x=self.h, y=z, gated=1, out=width, **second, **rows),
                _blocked_kernel(layer.w2).args(B, x=z, y=self.h, residual=self.h, **rows),
            ]
        self.kept = rows, heads, y, z  # keep these tensors alive, because the C structs contain only their addresses
        self.products = (c_extension.LinearArgs * len(products))(*products)
        data = forward.cache.data
        self.scores = torch.empty(B * K * G, data.shape[4], dtype=torch.float32, device="cpu")
        sizes = {"n": B, "K": K, "G": G, "hd": hd, "q_stride": (G + 2) * K * hd, "slots": data.shape[4]}
        strides = {"row_stride": data.stride(2), "head_stride": data.stride(3)}
        assert data.dtype == torch.bfloat16 and data.is_contiguous() and data.shape[2] >= B
        assert (len(data) * 4, data.shape[3], data.shape[5]) == (len(products), K, hd)
        tensors = {"q": heads, "turns": self.turns, "at": self.at, "scores": self.scores, "y": y}
        made = (
            fill_struct(avx512.AttentionArgs(), keys=keys, values=values, **tensors, **sizes, **strides)
            for keys, values in data
        )
        self.layers = (avx512.AttentionArgs * len(data))(*made)

    def __call__(self, tokens: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        forward = self.forward
        assert len(tokens) == len(self.h) and all(segment.kv_len <= forward.cache.data.shape[4] for segment in batch.segments)
        self.h.copy_(forward.model.tok_embeddings(tokens))
        self.turns.copy_(forward.freqs[batch.positions].view_as(self.turns))
        self.at.copy_(torch.stack((batch.rows, batch.positions), 1))
        avx512.call("layers", self.products, self.layers, len(self.layers))
        return forward.norm.forward(self.h)


class CpuBackend(TorchBackend):
    name = "cpu"

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it is for CPUs, and the device is {device}"
        return why_no_compiled_kernels()

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        hidden = forward.hidden_states if why_unsupported(forward) else FusedDecodeStep(forward, n_rows)
        return functools.partial(decode_layerwise, forward, hidden)


def why_no_compiled_kernels() -> str | None:
    """Return why this machine has no compiled kernels, and how to get them; None if it has compiled kernels."""
    if avx512.extension() is not None or avx2.extension() is not None:
        return None
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"the compiled kernels are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    return avx2.status().reason
