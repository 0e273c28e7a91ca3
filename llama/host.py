"""Decode steps on the CPU: an id of each of B rows in, what the last layer makes of it out.

A step reads every weight once, and what it does between two of them it does from memory: by then the caches hold weights, not
code. So a step goes through the layers with as few kernels and as little Python as there can be. Two of them do, each for one
call, since they hold the weights as they are when they are made; both give what `Transformer.hidden` gives, to the last bit.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from . import library, native, widened
from .attention import attend_one
from .blocks import BlockedLinear
from .cache import Batch
from .library import filled
from .model import RMSNorm, Transformer, TransformerBlock, norm_one, norm_rows
from .parallel import JoinedColumnParallelLinear, ParallelLinear, RowParallelLinear
from .rotary import turn_

Product = Callable[[torch.Tensor], torch.Tensor]
Hidden = Callable[[torch.Tensor, Batch], torch.Tensor]


def host_step(model: Transformer, n_rows: int) -> Hidden:
    """`Transformer.hidden` for one id of each of so many rows."""
    return NativeStep(model, n_rows) if NativeStep.serves(model) else HostStep(model, n_rows)


def matches_params(model: Transformer) -> bool:
    """Whether all layers have the widths that the model's params say: a caller may have put in narrower ones."""
    args = model.params
    inner, width = args.n_heads * args.head_dim, args.ffn_width
    said = [(args.dim, inner + 2 * args.kv_heads * args.head_dim), (inner, args.dim), (args.dim, 2 * width), (width, args.dim)]
    layers = (
        (b.attention.wqkv, b.attention.wo, b.feed_forward.w13, b.feed_forward.w2)
        for b in cast("list[TransformerBlock]", list(model.layers))
    )
    return all([(layer.in_features, layer.out_features) for layer in some] == said for some in layers)


class NativeStep:
    """In one call of native.c, which goes through the layers by itself: in bfloat16, on one rank."""

    @staticmethod
    def serves(model: Transformer) -> bool:
        layers = [m for m in model.layers.modules() if isinstance(m, JoinedColumnParallelLinear | RowParallelLinear)]
        norms = [m.weight.detach() for m in model.layers.modules() if isinstance(m, RMSNorm)]
        args = model.params
        return (
            not (args.dim % 32 or args.head_dim % 32 or args.ffn_width % 64)
            and all(m.ranks == 1 and in_blocks(m) for m in layers)
            and all(norm.shape == (args.dim,) and norm.is_contiguous() for norm in norms)
            and native.plain(model.tok_embeddings.weight.detach(), *norms)
            and model.dtype == torch.bfloat16
        )

    def __init__(self, model: Transformer, n_rows: int) -> None:
        args, B = model.params, n_rows
        K, G, hd = args.kv_heads, args.n_heads // args.kv_heads, args.head_dim
        dim, inner, width = args.dim, G * K * hd, args.ffn_width

        def room(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(B, *shape, dtype=dtype, device="cpu")

        self.model, self.h, self.turns, self.at = model, room(dim), room(hd, dtype=torch.float32), room(2, dtype=torch.int64)
        heads, y, z, normed = room((G + 2) * K, hd), room(inner), room(width), room(dim)
        rows = {"normed": normed, "room": room(3 * max(dim, inner, width), dtype=torch.uint8)}
        products = []
        self.kept: list[object] = [rows, z]  # native.c sees addresses
        for block in cast("list[TransformerBlock]", list(model.layers)):
            wqkv, wo = kernel_of(block.attention.wqkv), kernel_of(block.attention.wo)
            w13, w2 = kernel_of(block.feed_forward.w13), kernel_of(block.feed_forward.w2)
            first, second = ({"norm": norm.weight.detach(), "eps": norm.eps} for norm in (block.attention_norm, block.ffn_norm))
            products += [
                wqkv.filled(B, x=self.h, y=heads, **first, **rows),
                wo.filled(B, x=y, y=self.h, residual=self.h, **rows),
                w13.filled(B, x=self.h, y=z, gated=1, out=width, **second, **rows),
                w2.filled(B, x=z, y=self.h, residual=self.h, **rows),
            ]
            self.kept += [wqkv, wo, w13, w2, first, second]
        self.products = (library.Product * len(products))(*products)
        self.attention = {"q": heads, "turns": self.turns, "at": self.at, "y": y}
        self.sizes = {"n": B, "K": K, "G": G, "hd": hd, "q_stride": (G + 2) * K * hd}
        self.cache: torch.Tensor | None = None

    def look(self, data: torch.Tensor) -> None:
        """At the cache that there is now, (layers, 2, rows, K, slots, hd)."""
        n, K, G, hd = len(self.h), *(self.sizes[name] for name in ("K", "G", "hd"))
        n_layers, _, n_rows, heads, slots, width = data.shape
        assert data.dtype == torch.bfloat16 and data.is_contiguous() and n_rows >= n
        assert (n_layers * 4, heads, width) == (len(self.products), K, hd)
        self.cache, self.scores = data, torch.empty(n * K * G, slots, dtype=torch.float32, device="cpu")
        sizes = {"slots": slots, "row_stride": data.stride(2), "head_stride": data.stride(3)} | self.sizes
        each = ({"keys": keys, "values": values, "scores": self.scores} for keys, values in data)
        made = (filled(native.Attention(), **layer, **self.attention, **sizes) for layer in each)
        self.layers = (native.Attention * n_layers)(*made)

    def __call__(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        model, data = self.model, self.model.ready_cache().data
        assert len(ids) == len(self.h)
        if data is not self.cache:
            self.look(data)
        self.h.copy_(model.tok_embeddings(ids))
        self.turns.copy_(model.angles(batch.positions).view_as(self.turns))
        self.at.copy_(torch.stack((batch.rows, batch.positions), 1))
        native.call("layers", self.products, self.layers, len(self.layers))
        return model.norm(self.h)


def kernel_of(layer: ParallelLinear) -> BlockedLinear:
    assert isinstance(layer.packed, BlockedLinear)
    return layer.packed


def in_blocks(layer: ParallelLinear) -> bool:
    """Whether native.c reads a layer's weight, as it is."""
    packed = layer.packed
    if not isinstance(packed, BlockedLinear) or packed.library is not native.COMPILED or any(packed.padding):
        return False
    return packed.dtype == packed.out_dtype == torch.bfloat16  # a caller may have made one layer float32


class HostLayer(NamedTuple):
    """One layer's weights, and what multiplies by them."""

    attention_norm: torch.Tensor
    attention_eps: float
    wqkv: Product
    wo: Product
    ffn_norm: torch.Tensor
    ffn_eps: float
    w13: Product
    w2: Product


def product(layer: JoinedColumnParallelLinear | RowParallelLinear) -> Product:
    """What the layer does, without the module around it where there is one rank."""
    if layer.ranks > 1:
        return layer.forward
    if layer.packed:
        return layer.packed.multiply
    assert layer.weight is not None
    return functools.partial(widened.linear, weight=layer.weight)


class HostStep:
    """Without modules, and with all that layers share made once."""

    def __init__(self, model: Transformer, n_rows: int) -> None:
        self.model, self.n_rows = model, n_rows
        blocks = cast("list[TransformerBlock]", list(model.layers))
        self.heads = blocks[0].attention.n_local_kv_heads, blocks[0].attention.n_rep, model.params.head_dim
        self.layers = [
            HostLayer(
                block.attention_norm.weight,
                block.attention_norm.eps,
                product(block.attention.wqkv),
                product(block.attention.wo),
                block.ffn_norm.weight,
                block.ffn_norm.eps,
                product(block.feed_forward.w13),
                product(block.feed_forward.w2),
            )
            for block in blocks
        ]
        layers = [m for m in model.layers.modules() if isinstance(m, JoinedColumnParallelLinear | RowParallelLinear)]
        least = min(m.packed.least if m.packed and m.ranks == 1 else 1 for m in layers)
        # What is multiplied lies where there are as many rows as the kernels need, of which the first B count.
        widths = (
            model.params.dim,
            blocks[0].attention.wo.input_size_per_partition,
            blocks[0].feed_forward.w2.input_size_per_partition,
        )
        self.inputs = [model.norm.weight.new_zeros(max(n_rows, least), width) for width in widths]
        self.cut: Product = operator.itemgetter(slice(n_rows)) if n_rows < least else lambda rows: rows

    def __call__(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        model, B, cut, (K, G, hd) = self.model, self.n_rows, self.cut, self.heads
        assert len(ids) == B
        turns = torch.view_as_complex(model.angles(batch.positions))  # (B, 1, hd/2)
        data = model.ready_cache().data
        # Of each span keys and values, layer by layer, (rows, K, end, hd), and where its own go, (rows, 2, K, hd).
        places = [(slice(span.row, span.row + span.n_rows), span.end) for span in batch.spans]
        seen = [data[:, :, rows, :, :end].flatten(0, 1).unbind() for rows, end in places]
        slots = [data[:, :, rows, :, end - 1].transpose(1, 2).unbind() for rows, end in places]
        sizes = [span.n_rows for span in batch.spans]
        normed = norm_one if B == 1 else norm_rows

        def apart(rows: torch.Tensor) -> Sequence[torch.Tensor]:
            return rows.split(sizes) if len(sizes) > 1 else (rows,)

        x, y, z = self.inputs
        x_out, y_out, z_out = x[:B], apart(y[:B].view(B, K, G, hd)), z[:B]
        h = model.tok_embeddings(ids)  # (B, dim)
        for i, layer in enumerate(self.layers):
            torch.mul(normed(h, layer.attention_eps), layer.attention_norm, out=x_out)
            heads = cut(layer.wqkv(x)).view(B, -1, hd)
            turn_(heads.narrow(1, 0, K * G + K), turns)
            q, kv = heads.split((K * G, 2 * K), 1)
            queries, new = apart(q.view(B, K, G, hd)), apart(kv.view(B, 2, K, hd))
            for query, own, cached, slot, out in zip(queries, new, seen, slots, y_out, strict=True):
                slot[i].copy_(own)
                out.copy_(attend_one(query, cached[2 * i], cached[2 * i + 1], None))
            h = h + cut(layer.wo(y))
            torch.mul(normed(h, layer.ffn_eps), layer.ffn_norm, out=x_out)
            gate, up = cut(layer.w13(x)).chunk(2, 1)
            torch.mul(F.silu(gate), up, out=z_out)
            h = h + cut(layer.w2(z))
        return model.norm(h)
