"""Choose the backend of a model: by name, or the fastest that supports the device.

eager           `Transformer.forward`, module by module, on weights that are not packed
torch           the engine's forward, layer by layer on any device, with kernels launched one by one
cpu             the engine's forward with this library's compiled kernels; if possible, a decode step is a single call of C
cuda_graphs     the engine's forward; a decode step is captured once and then replayed with one launch
torch_compile   like cuda_graphs, with the small kernels of a layer fused by torch.compile

With any backend, a model that the caller has modified runs `Transformer.forward`, module by module.
"""

import platform
import sys

import torch

from .. import model, tuning
from ..engine.backend import Backend
from ..errors import DeviceError, InputError, check_flag, describe
from ..kernels import avx2, avx512, pack
from . import cpu
from .cpu import CpuBackend
from .cuda_graphs import CudaGraphsBackend
from .eager import EagerBackend
from .layerwise import TorchBackend
from .torch_compile import TorchCompileBackend

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (TorchCompileBackend, CudaGraphsBackend, CpuBackend, TorchBackend, EagerBackend)
}
# The backends that backend="auto" may choose, fastest first. torch_compile is not one of them, because it must compile for
# several seconds for each number of rows.
AUTO = (CudaGraphsBackend, CpuBackend, TorchBackend)


def check_compile(compile: bool, backend: str, device: torch.device) -> None:
    """Raise InputError or DeviceError if `build(compile=compile, backend=backend)` is impossible on a device."""
    check_flag(compile, "compile")
    if compile and device.type != "cuda":
        raise DeviceError(f"compile=True is for CUDA, and this is {device}; leave it out: a step is not compiled here")
    if compile and backend not in ("auto", "torch_compile"):
        raise InputError(f"compile=True is backend='torch_compile', and backend is {describe(backend)}; leave one of them out")


def choose_backend(name: str, device: torch.device) -> type[Backend]:
    """Return the backend with the given name, or for "auto" the fastest backend that supports the device.

    Raises InputError for an unknown name, and DeviceError if the named backend does not support the device.
    """
    if name == "auto":
        return next(backend for backend in AUTO if backend.unsupported(device) is None)
    if not isinstance(name, str) or name not in BACKENDS:
        raise InputError(f"backend is {describe(name)}; use 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if why := BACKENDS[name].unsupported(device):
        raise DeviceError(f"backend={name!r}: {why}; use backend='auto'")
    return BACKENDS[name]


def slowdown_warning(
    backend: type[Backend], device: torch.device, args: model.ModelArgs, dtype: torch.dtype, quantize: str | None
) -> str | None:
    """Return one line that says why decoding on this CPU is slower than it could be; None if it is not."""
    if device.type != "cpu" or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return None
    missing = [status for status in (avx512.status(), avx2.status(), pack.status()) if status.not_compiled]
    if backend.name in ("torch", "cpu") and missing:  # without a new build after an update, extensions may be missing
        return f"llama: decoding is slower than it could be, without compiled kernels: {missing[0].reason}"
    # No warning for a small model, whose steps take microseconds anyway, nor for a quantized float32 model, which runs layer by
    # layer whatever its widths are.
    is_fusable_dtype = dtype == torch.bfloat16 or (dtype == torch.float32 and quantize is None)
    is_large = 4 * args.dim * args.ffn_width >= tuning.MIN_PACKED_BYTES
    may_fuse = backend.name == "cpu" and avx512.extension() and is_fusable_dtype and is_large
    if may_fuse and (why := cpu.why_width_unsupported(args)):
        return f"llama: decoding is slower than it could be, layer by layer: {why}"
    return None
