"""What setup.py compiled from C, and how it is called: on PyTorch's own threads, with structures of sizes and addresses."""

import ctypes
import importlib.util
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_long, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import compat

SOURCES = Path(__file__).with_name("csrc")
BF16, FP16, FP32, INT8, INT4 = range(5)  # of weights; the first three also of what they multiply
DTYPE_CODES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}


class CExtension:
    """A file of C, whose functions take these structures, and numbers after them."""

    def __init__(self, path: str, functions: Mapping[str, Sequence[Any]]) -> None:
        self.library = ctypes.CDLL(path)
        # What runs a function on each of the threads; where PyTorch has threads of another kind there is none.
        parallel = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).GOMP_parallel
        self.parallel = ctypes.cast(parallel, c_void_p)
        for name, kinds in functions.items():
            function = getattr(self.library, name)
            types = [kind if kind is c_long else ctypes.POINTER(kind) for kind in kinds]
            function.argtypes, function.restype = [c_void_p, c_uint, *types], None

    def call(self, name: str, *args: Any) -> None:
        getattr(self.library, name)(self.parallel, torch.get_num_threads(), *args)


REINSTALL = "install llama again where there is a C compiler (gcc)"


@dataclass(frozen=True)
class ExtensionStatus:
    """A loaded extension, or why there is none."""

    extension: CExtension | None
    reason: str = ""  # why it cannot be used
    not_compiled: bool = False  # True if this CPU could use it, were it compiled


def load_extension(name: str, structures: Sequence[Any], functions: Mapping[str, Sequence[Any]]) -> ExtensionStatus:
    """Load the extension module _<name>, if it was compiled from the C sources here and this CPU has what it needs."""
    if os.environ.get("LLAMA_COMPILED") == "0":
        return ExtensionStatus(None, "switched off by LLAMA_COMPILED=0", not_compiled=True)
    spec = importlib.util.find_spec(f"._{name}", __package__)
    if spec is None or spec.origin is None:
        return ExtensionStatus(None, f"_{name} has not been compiled: {REINSTALL}", not_compiled=True)
    try:
        extension = CExtension(spec.origin, functions)
        source, *sizes = (c_long * (1 + len(structures))).in_dll(extension.library, "abi_info")
        supported = extension.library.cpu_supported()
    except (AttributeError, OSError, ValueError) as e:
        reason = f"_{name} cannot be loaded ({' '.join(str(e).split()):.80}): {REINSTALL}"
        return ExtensionStatus(None, reason, not_compiled=True)
    files = sorted(SOURCES.glob("*.[ch]"))  # present in a clone only
    changed = bool(files) and source != zlib.crc32(b"".join(file.read_bytes() for file in files))
    if changed or sizes != [*map(ctypes.sizeof, structures)]:
        reason = f"a C file in llama/kernels/csrc has changed since _{name} was compiled: install llama again"
        warnings.warn(reason, stacklevel=3)
        return ExtensionStatus(None, reason, not_compiled=True)
    if not supported:
        return ExtensionStatus(None, f"this CPU lacks instructions that _{name} needs")
    return ExtensionStatus(extension)


def struct_fields(*kinds: tuple[Any, str]) -> Any:
    """Of a structure: the names that have each kind."""
    return [(name, kind) for kind, names in kinds for name in names.split()]


class LinearArgs(ctypes.Structure):
    """native.h explains it."""

    _fields_ = struct_fields(
        (c_long, "kind numbers y_numbers digits"),
        (c_void_p, "weight scales"),
        (c_long, "group in_ out gated"),
        (c_void_p, "norm"),
        (c_float, "eps unused"),
        (c_void_p, "x y residual normed room"),
        (c_long, "n threads next"),
        (c_void_p * 3, "parts"),
        (c_long * 3, "ends"),
    )


def fill_struct(structure: Any, **fields: Any) -> Any:
    """The structure, with these fields set; tensors stand for their addresses, and must outlive it."""
    for name, value in fields.items():
        assert hasattr(structure, name), name
        setattr(structure, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
    return structure


def is_plain_tensor(*tensors: torch.Tensor) -> bool:
    """Return True if C may read the tensors' memory: plain CPU tensors that are not traced, transformed or differentiated."""
    return (
        not torch.compiler.is_compiling()
        and all(
            type(t) in (torch.Tensor, torch.nn.Parameter)
            and t.is_cpu
            and not (t.requires_grad and torch.is_grad_enabled())
            and not compat.is_transformed(t)
            for t in tensors
        )
        and not compat.is_intercepted()
    )
