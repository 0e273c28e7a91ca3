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

import platform
import sys

import torch

from .. import model, tuning
from ..engine.backend import Backend
from ..errors import DeviceError, InputError, describe
from ..kernels import avx2, avx512, pack
from . import cpu
from .cpu import CpuBackend
from .cuda_graphs import CudaGraphsBackend
from .eager import EagerBackend
from .layerwise import TorchBackend
from .torch_compile import TorchCompileBackend

BACKENDS: dict[str, type[Backend]] = {
    each.name: each for each in (TorchCompileBackend, CudaGraphsBackend, CpuBackend, TorchBackend, EagerBackend)
}
AUTO = (
    CudaGraphsBackend,
    CpuBackend,
    TorchBackend,
)  # the fastest first; torch_compile takes seconds for each number of rows, so it is asked for


def choose_backend(wanted: str, device: torch.device) -> type[Backend]:
    """Return the backend of this name, or for "auto" the fastest that can serve the device. Raises InputError for other names,
    and DeviceError where the one named cannot serve the device."""
    if wanted == "auto":
        return next(each for each in AUTO if each.unsupported(device) is None)
    if not isinstance(wanted, str) or wanted not in BACKENDS:
        raise InputError(f"backend is {describe(wanted)}; use 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if why := BACKENDS[wanted].unsupported(device):
        raise DeviceError(f"backend={wanted!r}: {why}; use backend='auto'")
    return BACKENDS[wanted]


def slowdown_warning(backend: type[Backend], device: torch.device, args: model.ModelArgs, dtype: torch.dtype) -> str | None:
    """Return what makes decoding slower on this CPU than it could be, in one line; None if nothing does."""
    if device.type != "cpu" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return None
    missing = [each for each in (avx512.status(), avx2.status(), pack.status()) if each.not_compiled]
    if backend.name in ("torch", "cpu") and missing:  # one may be missing alone, if it was compiled from older sources
        return f"llama: decoding is slower than it could be, without compiled kernels: {missing[0].reason}"
    packed = 2 * args.dim * args.ffn_width * dtype.itemsize >= tuning.MIN_PACKED_BYTES  # else steps take microseconds anyway
    if (
        backend.name == "cpu"
        and avx512.extension()
        and dtype in cpu.DTYPES
        and packed
        and (why := cpu.why_width_unsupported(args))
    ):
        return f"llama: decoding is slower than it could be, layer by layer: {why}"
    return None
