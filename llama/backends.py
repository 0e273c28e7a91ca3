"""How a model computes, chosen once: by name, or the fastest that can serve it.

    eager           `Transformer.forward`, module by module, on plain tensors; it also serves a model that a caller has changed
    torch           the engine (forward.py), layer by layer on any device, its kernels launched one by one
    cpu             the engine with this library's compiled kernels; where native.c takes the model, a decode step is one call
    cuda_graphs     the engine; a decode step is captured once and then replayed with one launch
    torch_compile   cuda_graphs, with the small kernels of a layer fused by torch.compile

A captured step has static shapes, rows by a bucket of cache positions, and keeps its inputs and its output where they are;
positions are values on the device, and a mask hides what lies beyond them. Buckets double, so that a step reads at most twice
the positions it needs. `Step.run` is what is captured; it runs on any device, which is how the tests see it.
"""

import contextlib
import functools
import inspect
import platform
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from . import avx2, host, library, native, widened
from . import model as reference
from .cache import Batch
from .compiled import CompiledLayer, any_number_of_shapes
from .errors import DeviceError, InputError, kind
from .forward import Forward, Layer
from .parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from .ranks import global_rank

SMALLEST_BUCKET = 128
CAPTURING = threading.Lock()  # one capture at a time: beginning one synchronizes the device, an error during another
MOST_STEPS = 64  # kept at a time: each has its own memory for what it computes

# tokens and positions (B,) of rows 0..B -> float32 logits (B, vocab), valid until the next step. The list has the positions as
# known to the host: 0 for an ended row, whose entry in the tensor is arbitrary.
Take = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


# --- has a caller changed the model? ---------------------------------------------------------------------------------------

CLASSES = (
    reference.Transformer, reference.TransformerBlock, reference.Attention, reference.FeedForward, reference.RMSNorm,
    ColumnParallelLinear, RowParallelLinear, ParallelEmbedding,
)  # fmt: skip
FUNCTIONS = {
    owner: {name: value for name, value in vars(owner).items() if inspect.isfunction(value)} for owner in (reference, *CLASSES)
}
CALL = nn.Module.__call__


def changed(model: nn.Module) -> str | None:
    """Return, in words, a change that only the model's own `forward` respects; None if there is none: modules of this library,
    of the expected shapes, without hooks or patched functions."""
    if type(model) is not reference.Transformer:
        return f"the model is a {type(model).__name__}, not a Transformer"
    for owner, functions in FUNCTIONS.items():
        for name, function in functions.items():
            if vars(owner).get(name) is not function:
                return f"{owner.__name__}.{name} has been replaced"
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return "there is a forward hook on all modules"
    if nn.Module.__call__ is not CALL or any("__call__" in vars(each) for each in CLASSES):
        return "the __call__ of modules has been replaced"
    for name, module in model.named_modules():
        if type(module) not in (*CLASSES, nn.ModuleList):
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{name or 'the model'} has a hook"
        if replaced := vars(module).keys() & FUNCTIONS.get(type(module), {}).keys():
            return f"{name or 'the model'}.{min(replaced)} has been replaced"
        if module._compiled_call_impl:
            return f"{name or 'the model'} has been compiled"
        if getattr(module, "bias", None) is not None:
            return f"{name} has a bias"
    return _reshaped(model)


def _reshaped(model: reference.Transformer) -> str | None:
    args, ranks = model.params, model.output.ranks
    dim, hd, width = args.dim, args.head_dim, args.ffn_width // ranks
    heads, kv_heads = args.n_heads // ranks, args.kv_heads // ranks
    shapes = {
        "attention.wq": (heads * hd, dim), "attention.wk": (kv_heads * hd, dim), "attention.wv": (kv_heads * hd, dim),
        "attention.wo": (dim, heads * hd), "feed_forward.w1": (width, dim), "feed_forward.w2": (dim, width),
        "feed_forward.w3": (width, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
    }  # fmt: skip
    cache = args.max_batch_size, args.max_seq_len, kv_heads, hd
    if not len(model.layers):
        return "it has no layers"
    if len({id(layer) for layer in model.layers}) < len(model.layers):
        return "it has a layer twice"
    words = args.vocab_size, dim // ranks
    ends: dict[str, tuple[int, ...]] = {"tok_embeddings": words, "norm": (dim,), "output": (words[0] // ranks, dim)}
    for name, size in ends.items():
        weight: Any = model.get_submodule(name).weight
        if tuple(weight.shape) != size:
            return f"{name}.weight is {tuple(weight.shape)}, not {size}"
    first = None
    for i, layer in enumerate(model.layers):
        if not isinstance(layer, reference.TransformerBlock):
            return f"layers.{i} is a {type(layer).__name__}"
        for name, shape in shapes.items():
            weight = layer.get_submodule(name).weight
            if tuple(weight.shape) != shape:
                return f"layers.{i}.{name}.weight is {tuple(weight.shape)}, not {shape}"
        a = layer.attention
        if (a.n_local_heads, a.n_local_kv_heads, a.n_rep, a.head_dim) != (heads, kv_heads, heads // kv_heads, hd):
            return f"layers.{i}.attention has other numbers of heads"
        for held in (a.cache_k, a.cache_v):
            first = first or held.shape
            if held.ndim != 4 or held.shape != first or any(have < need for have, need in zip(held.shape, cache, strict=True)):
                return f"layers.{i}.attention has a cache of {tuple(held.shape)}"
    freqs = model.freqs_cis
    if freqs.dtype != torch.complex64 or freqs.ndim != 2 or freqs.shape[1] != hd // 2 or len(freqs) < args.max_seq_len:
        return f"freqs_cis is {tuple(freqs.shape)} of {freqs.dtype}"
    return None


# --- the backends ----------------------------------------------------------------------------------------------------------


class Backend:
    """The steps of a model. `name` is what `build` takes."""

    name = ""
    packs = False  # whether weights are held in the forms of kernels of this library

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        """Return why this backend cannot serve a device on this machine; None if it can."""
        return None

    def begin(self, forward: Forward, n_rows: int) -> Take:
        """Return the function that runs a call's decode steps, with the model's weights as they are now."""
        raise NotImplementedError


class Eager(Backend):
    name = "eager"


class Torch(Backend):
    name = "torch"
    packs = True

    def begin(self, forward: Forward, n_rows: int) -> Take:
        return functools.partial(launched, forward, forward.hidden)


class Cpu(Torch):
    name = "cpu"

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it is for CPUs, and the device is {device}"
        return no_compiled_code()

    def begin(self, forward: Forward, n_rows: int) -> Take:
        hidden = forward.hidden if host.why_not(forward) else host.NativeStep(forward, n_rows)
        return functools.partial(launched, forward, hidden)


def launched(
    forward: Forward,
    hidden: Callable[[torch.Tensor, Batch], torch.Tensor],
    tokens: torch.Tensor,
    positions: torch.Tensor,
    at: list[int],
) -> torch.Tensor:
    """Take a step kernel by kernel."""
    if forward.device.type == "cpu" or len(set(at)) == 1:  # on the CPU each row sees its own positions only: as alone
        batch = Batch.of(((row, position, 1) for row, position in enumerate(at)), forward.device)
    else:
        batch = Batch.step(positions, max(at) + 1)
    return forward.logits(hidden(tokens, batch))


def no_compiled_code() -> str | None:
    """Return why this machine has no compiled kernels, and the way to get them; None if it has."""
    if native.COMPILED is not None or avx2.LIBRARY is not None:
        return None
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"the compiled kernels are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    return library.REASONS.get("avx2", "none has been loaded")


class CudaGraphs(Backend):
    name = "cuda_graphs"
    packs = True

    def __init__(self) -> None:
        self.captures = True
        self.layer: CompiledLayer | None = None
        self.steps: dict[tuple[int, int], Step] = {}
        self.forward: Forward | None = None
        self.memory: list[object] = []  # what the steps look at
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"it is for CUDA, and the device is {device}"

    def begin(self, forward: Forward, n_rows: int) -> Take:
        self._look(forward)
        return self.take

    def _look(self, forward: Forward) -> None:
        """Drop the captured steps if a weight or the cache that they read has been replaced."""
        memory = [self.layer, *forward.addresses()]
        if memory != self.memory:
            self.steps, self.stream, self.pool, self.memory, self.forward = {}, None, None, memory, forward

    def take(self, tokens: torch.Tensor, positions: torch.Tensor, at: list[int]) -> torch.Tensor:
        assert self.forward is not None
        key = len(tokens), bucket(max(at) + 1, self.forward.cache.data.shape[4])
        step = self.steps.pop(key, None)
        if step:
            logits = step(tokens, positions)
        else:
            step, logits = self._make(*key, tokens, positions)
        self.steps[key] = step  # the last used is the last
        if len(self.steps) > MOST_STEPS:
            del self.steps[next(iter(self.steps))]
        return logits

    def _make(self, n_rows: int, end: int, tokens: torch.Tensor, positions: torch.Tensor) -> "tuple[Step, torch.Tensor]":
        """Return a new step and the logits of its first run. Capturing runs nothing, so that ranks launch the same collectives
        whether they have the step or make it."""
        assert self.forward is not None
        step = Step(self.forward, self.layer, n_rows, end)
        try:
            with any_number_of_shapes() if self.layer else contextlib.nullcontext():
                logits = step(tokens, positions)
        except Exception as e:
            if self.layer is None:
                raise
            raise DeviceError(
                f"torch.compile failed; leave compile=True out, or use backend='cuda_graphs' ({' '.join(str(e).split()):.200})"
            ) from e
        if self.captures and self.forward.device.type == "cuda":
            with torch.cuda.device(self.forward.device), CAPTURING:
                self._capture(step)
        return step, logits

    def _capture(self, step: "Step") -> None:
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            step.capture(self.stream, self.pool)
        except RuntimeError as e:  # ranks need not agree on it: captured or not, they launch the same collectives
            self.captures, self.pool = False, None
            if global_rank() == 0:
                reason = str(e).split("\n")[0]
                print(f"no CUDA graphs, each step is launched kernel by kernel: {reason}", file=sys.stderr)


class TorchCompile(CudaGraphs):
    name = "torch_compile"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = CompiledLayer(**options)


BACKENDS: dict[str, type[Backend]] = {each.name: each for each in (TorchCompile, CudaGraphs, Cpu, Torch, Eager)}
AUTO = CudaGraphs, Cpu, Torch  # the fastest first; torch_compile takes seconds for each number of rows, so it is asked for


def choose(wanted: str, device: torch.device) -> type[Backend]:
    """Return the backend of this name, or for "auto" the fastest that can serve the device. Raises InputError for other names,
    and DeviceError where the one named cannot serve the device."""
    if wanted == "auto":
        return next(each for each in AUTO if each.unsupported(device) is None)
    if not isinstance(wanted, str) or wanted not in BACKENDS:
        raise InputError(f"backend is {kind(wanted)}; use 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if why := BACKENDS[wanted].unsupported(device):
        raise DeviceError(f"backend={wanted!r}: {why}; use backend='auto'")
    return BACKENDS[wanted]


def slower(backend: type[Backend], device: torch.device, args: reference.ModelArgs, dtype: torch.dtype) -> str | None:
    """Return what makes decoding slower on this CPU than it could be, in one line; None if nothing does."""
    if device.type != "cpu" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return None
    if backend.name in ("torch", "cpu") and library.MISSING:  # be it one of them, as after an update of some files
        return f"llama: decoding is slower than it could be, without compiled kernels: {library.REASONS[min(library.MISSING)]}"
    packed = 2 * args.dim * args.ffn_width * dtype.itemsize >= widened.SMALLEST  # else steps take microseconds anyway
    if backend.name == "cpu" and native.COMPILED and dtype == torch.bfloat16 and packed and (why := host.odd_width(args)):
        return f"llama: decoding is slower than it could be, layer by layer: {why}"
    return None


def bucket(end: int, positions: int) -> int:
    """Return how many positions a captured step looks at, to see 0..end."""
    return min(max(SMALLEST_BUCKET, 1 << (end - 1).bit_length()), positions)


class Step:
    """A decode step of rows 0..n_rows over the cache's positions 0..end, in static memory."""

    def __init__(self, forward: Forward, layer: CompiledLayer | None, n_rows: int, end: int) -> None:
        self.forward, self.layer = forward, layer
        self.tokens = torch.zeros(n_rows, dtype=torch.int64, device=forward.device)
        self.positions = torch.zeros_like(self.tokens)
        self.batch = Batch.step(self.positions, end)
        self.logits: torch.Tensor | None = None
        self.replay: Callable[[], None] = self.run

    def run(self) -> None:
        hidden = self.forward.hidden(self.tokens, self.batch, block=self.layer or Layer.__call__)
        self.logits = self.layer.logits(self.forward, hidden) if self.layer else self.forward.logits(hidden)

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Make `replay` a CUDA graph of `run`, which has run before: libraries have their workspaces, code is compiled."""
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": what other threads do meanwhile, another model's allocations say, is none of its business.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.run()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails does not
        before.wait_stream(stream)
        self.replay = graph.replay

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits stay right until the next call."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.replay()
        assert self.logits is not None
        return self.logits
