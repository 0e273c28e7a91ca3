"""Detect whether a caller has modified a model. Only an unmodified model may run through the engine's forward."""

import inspect
import operator
from typing import Any

import torch
from torch import nn

from .. import compat
from .. import model as reference
from ..layers.embedding import ParallelEmbedding
from ..layers.linear import ColumnParallelLinear, RowParallelLinear

STOCK_CLASSES = (
    reference.Transformer, reference.TransformerBlock, reference.Attention, reference.FeedForward, reference.RMSNorm,
    ColumnParallelLinear, RowParallelLinear, ParallelEmbedding,
)  # fmt: skip
STOCK_METHODS = {
    owner: {name: value for name, value in vars(owner).items() if inspect.isfunction(value)}
    for owner in (reference, *STOCK_CLASSES)
}
STOCK_CALL = nn.Module.__call__
_LAYER_WEIGHTS = (
    "attention.wq.weight", "attention.wk.weight", "attention.wv.weight", "attention.wo.weight",
    "feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight", "attention_norm.weight", "ffn_norm.weight",
)  # fmt: skip
_layer_weights = operator.attrgetter(*_LAYER_WEIGHTS)


def observe_edits(model: reference.Transformer, backend: str) -> None:
    """Notice edits of a model's tensors from now on; no caller may have them yet. backend: its name; "eager" needs nothing."""
    if backend != "eager":
        for tensor in (*model.parameters(), model.freqs_cis):
            compat.observe(tensor)


def why_modified(model: nn.Module) -> str | None:
    """Return a text that names the first modification that the engine's forward would ignore; None if there is none.

    An unmodified model has only modules of this library with the expected shapes, and no biases, hooks or replaced functions.
    """
    if type(model) is not reference.Transformer:
        return f"the model is a {type(model).__name__}, not a Transformer"
    for owner, functions in STOCK_METHODS.items():
        for name, function in functions.items():
            if vars(owner).get(name) is not function:
                return f"{owner.__name__}.{name} has been replaced"
    if compat.has_global_forward_hooks():
        return "there is a forward hook on all modules"
    if nn.Module.__call__ is not STOCK_CALL or any("__call__" in vars(stock_class) for stock_class in STOCK_CLASSES):
        return "the __call__ of modules has been replaced"
    for name, module in model.named_modules():
        if type(module) not in (*STOCK_CLASSES, nn.ModuleList):
            return f"{name} is a {type(module).__name__}"
        if compat.has_hooks(module):
            return f"{name or 'the model'} has a hook"
        if replaced := vars(module).keys() & STOCK_METHODS.get(type(module), {}).keys():
            return f"{name or 'the model'}.{min(replaced)} has been replaced"
        if compat.is_compiled(module):
            return f"{name or 'the model'} has been compiled"
        if getattr(module, "bias", None) is not None:
            return f"{name} has a bias"
    return _why_reshaped(model)


def _why_reshaped(model: reference.Transformer) -> str | None:
    """Return a text that names the first tensor or size of a model that does not fit `model.params`; None if all fit."""
    args, ranks = model.params, model.output.ranks
    dim, hd, width = args.dim, args.head_dim, args.ffn_width // ranks
    heads, kv_heads = args.n_heads // ranks, args.kv_heads // ranks
    layer_shapes = (
        (heads * hd, dim), (kv_heads * hd, dim), (kv_heads * hd, dim), (dim, heads * hd),
        (width, dim), (dim, width), (width, dim), (dim,), (dim,),
    )  # fmt: skip
    min_cache_shape = args.max_batch_size, args.max_seq_len, kv_heads, hd
    if not len(model.layers):
        return "the model has no layers"
    if len({id(layer) for layer in model.layers}) < len(model.layers):
        return "the model has a layer twice"
    other_shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (args.vocab_size, dim // ranks), "norm": (dim,), "output": (args.vocab_size // ranks, dim),
    }  # fmt: skip
    for name, shape in other_shapes.items():
        weight: Any = model.get_submodule(name).weight
        if tuple(weight.shape) != shape:
            return f"{name}.weight is {tuple(weight.shape)}, not {shape}"
    cache_shape = None  # None, or the shape of the first layer's cache, which all layers must have
    for i, layer in enumerate(model.layers):
        if not isinstance(layer, reference.TransformerBlock):
            return f"layers.{i} is a {type(layer).__name__}"
        for name, weight, shape in zip(_LAYER_WEIGHTS, _layer_weights(layer), layer_shapes, strict=True):
            if weight.shape != shape:
                return f"layers.{i}.{name} is {tuple(weight.shape)}, not {shape}"
        attention = layer.attention
        sizes = attention.n_local_heads, attention.n_local_kv_heads, attention.n_rep, attention.head_dim
        if sizes != (heads, kv_heads, heads // kv_heads, hd):
            return f"layers.{i}.attention has numbers of heads that differ from the model's params"
        for cache in (attention.cache_k, attention.cache_v):
            cache_shape = cache_shape or cache.shape
            too_small = cache.ndim != 4 or any(n < needed for n, needed in zip(cache.shape, min_cache_shape, strict=True))
            if too_small or cache.shape != cache_shape:
                return f"layers.{i}.attention has a cache of shape {tuple(cache.shape)}"
    freqs = model.freqs_cis
    if freqs.dtype != torch.complex64 or freqs.ndim != 2 or freqs.shape[1] != hd // 2 or len(freqs) < args.max_seq_len:
        return f"freqs_cis is {tuple(freqs.shape)} of {freqs.dtype}"
    return None
