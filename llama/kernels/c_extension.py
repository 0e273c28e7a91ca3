"""Load the C extensions that setup.py compiled, and call their functions on PyTorch's threads.

Arguments are C structures of sizes and addresses; `fill_struct` sets their fields.
"""

import ctypes
import os
import sys
import warnings
import zlib
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_long, c_uint, c_void_p
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from .. import compat

SOURCES = Path(__file__).with_name("csrc")
BF16, FP16, FP32, INT8, INT4 = range(5)  # format codes of csrc/common.h; activations use the first three
DTYPE_CODES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}


class CExtension:
    """A loaded C extension. Arguments of its functions are pointers to structures, followed by integers."""

    def __init__(self, name: str, path: str, functions: Mapping[str, Sequence[Any]]) -> None:
        self.name = name
        self.library = ctypes.CDLL(path)
        # GOMP_parallel runs a function on PyTorch's own threads. Looking it up raises AttributeError if PyTorch was built with
        # another OpenMP library.
        parallel = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).GOMP_parallel
        self.parallel = ctypes.cast(parallel, c_void_p)
        for function_name, parameters in functions.items():
            function = getattr(self.library, function_name)
            types = [parameter if parameter is c_long else ctypes.POINTER(parameter) for parameter in parameters]
            function.argtypes, function.restype = [c_void_p, c_uint, *types], None

    def call(self, name: str, *args: Any) -> None:
        """Call a C function of the extension on as many threads as PyTorch uses."""
        getattr(self.library, name)(self.parallel, torch.get_num_threads(), *args)


REINSTALL = "install llama again where there is a C compiler (gcc)"


@dataclass(frozen=True)
class ExtensionStatus:
    """A loaded extension, or the reason why it cannot be used."""

    extension: CExtension | None
    reason: str = ""
    not_compiled: bool = False  # True if the reason is the installation or a setting, rather than this CPU


def load_extension(name: str, structures: Sequence[Any], functions: Mapping[str, Sequence[Any]]) -> ExtensionStatus:
    """Load the extension module `_<name>`, and return it or the reason why it cannot be used.

    The module must have been compiled from the current C files, with structures of the same sizes as `structures`, and the CPU
    must have the instructions that the module uses. `functions` maps names of C functions to the types of their parameters.
    """
    if os.environ.get("LLAMA_COMPILED") == "0":
        return ExtensionStatus(None, "switched off by LLAMA_COMPILED=0", not_compiled=True)
    # `pip install .` compiles for the installed package only, but a script in the clone imports the clone's Python files. So
    # look in other folders of sys.path, too. The check of the source files below refuses an extension of another version.
    folders = [str(SOURCES.parent), *(os.path.join(entry, "llama", "kernels") for entry in sys.path)]
    spec = PathFinder.find_spec(f"{__package__}._{name}", folders)
    if spec is None or spec.origin is None:
        return ExtensionStatus(None, f"_{name} has not been compiled: {REINSTALL}", not_compiled=True)
    try:
        extension = CExtension(name, spec.origin, functions)
        source, *sizes = (c_long * (1 + len(structures))).in_dll(extension.library, "abi_info")
        supported = extension.library.cpu_supported()
    except (AttributeError, OSError, ValueError) as e:
        reason = f"_{name} cannot be loaded ({' '.join(str(e).split()):.80}): {REINSTALL}"
        return ExtensionStatus(None, reason, not_compiled=True)
    files = sorted(SOURCES.glob("*.[ch]"))  # empty in an installed package, which contains no C files
    changed = bool(files) and source != zlib.crc32(b"".join(file.read_bytes() for file in files))
    if changed or sizes != [*map(ctypes.sizeof, structures)]:
        reason = f"a C file in llama/kernels/csrc has changed since _{name} was compiled: install llama again"
        warnings.warn(reason, stacklevel=3)
        return ExtensionStatus(None, reason, not_compiled=True)
    if not supported:
        return ExtensionStatus(None, f"this CPU lacks instructions that _{name} needs")
    return ExtensionStatus(extension)


def struct_fields(*typed_names: tuple[Any, str]) -> Any:
    """Return the `_fields_` of a ctypes structure, from pairs of a C type and field names separated by spaces."""
    return [(name, type_) for type_, names in typed_names for name in names.split()]


class LinearArgs(ctypes.Structure):
    """The arguments of the C function `linear`, which computes a linear layer; csrc/common.h describes the fields."""

    _fields_ = struct_fields(
        (c_long, "format x_dtype y_dtype int8_per_activation"),
        (c_void_p, "weight scales"),
        (c_long, "group in_ out gated"),
        (c_void_p, "norm"),
        (c_float, "eps unused"),
        (c_void_p, "x y residual normed scratch"),
        (c_long, "n threads next"),
        (c_void_p * 3, "parts"),
        (c_long * 3, "ends"),
        (c_long, "dequantize tiled quantizes_x"),
    )


def fill_struct(structure: Any, **fields: Any) -> Any:
    """Set fields of a C structure and return the structure. Tensors are stored as addresses and must outlive the structure."""
    for name, value in fields.items():
        assert hasattr(structure, name), name
        setattr(structure, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
    return structure


def is_plain_tensor(*tensors: torch.Tensor) -> bool:
    """Return True if C code may read the tensors: ordinary CPU tensors that are not traced and need no gradient."""
    return (
        not torch.compiler.is_compiling()
        and all(
            type(t) in compat.PLAIN_TYPES
            and t.is_cpu
            and not (t.requires_grad and torch.is_grad_enabled())
            and not compat.is_transformed(t)
            for t in tensors
        )
        and not compat.is_intercepted()
    )
