"""What setup.py compiled from C, and how it is called: on PyTorch's own threads, with structures of sizes and addresses."""

import ctypes
import importlib.util
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_long, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
BF16, FP16, FP32, INT8, INT4 = range(5)  # of weights; the first three also of what they multiply
NUMBERS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}


class Library:
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


REASONS: dict[str, str] = {}  # why a library has not been loaded
MISSING: set[str] = set()  # those that this CPU could use
AGAIN = "install llama again where there is a C compiler (gcc)"


def load(name: str, structures: Sequence[Any], functions: Mapping[str, Sequence[Any]]) -> Library | None:
    """Return the library _<name>, if it was compiled from the C that stands here, and this CPU has what it needs; else None,
    and say why in REASONS."""
    if os.environ.get("LLAMA_COMPILED") == "0":
        MISSING.add(name)
        REASONS[name] = "switched off by LLAMA_COMPILED=0"
        return None
    spec = importlib.util.find_spec(f"._{name}", __package__)
    if spec is None or spec.origin is None:
        MISSING.add(name)
        REASONS[name] = f"_{name} has not been compiled: {AGAIN}"
        return None
    try:
        made = Library(spec.origin, functions)
        source, *sizes = (c_long * (1 + len(structures))).in_dll(made.library, "interface")
        serves = made.library.serves()
    except (AttributeError, OSError, ValueError) as e:
        MISSING.add(name)
        REASONS[name] = f"_{name} cannot be loaded ({' '.join(str(e).split()):.80}): {AGAIN}"
        return None
    files = sorted(HERE.glob("*.[ch]"))  # which are there in a clone
    changed = bool(files) and source != zlib.crc32(b"".join(file.read_bytes() for file in files))
    if changed or sizes != [*map(ctypes.sizeof, structures)]:
        message = f"a .c or .h file in llama/ has changed since _{name} was compiled, which is not used; install llama again"
        warnings.warn(message, stacklevel=2)
        MISSING.add(name)
        REASONS[name] = f"a .c or .h file in llama/ has changed since _{name} was compiled: install llama again"
        return None
    if not serves:
        REASONS[name] = f"this CPU lacks instructions that _{name} needs"
        return None
    return made


def fields(*kinds: tuple[Any, str]) -> Any:
    """Of a structure: the names that have each kind."""
    return [(name, kind) for kind, names in kinds for name in names.split()]


class Product(ctypes.Structure):
    """native.h explains it."""

    _fields_ = fields(
        (c_long, "kind numbers y_numbers digits"),
        (c_void_p, "weight scales"),
        (c_long, "group in_ out gated"),
        (c_void_p, "norm"),
        (c_float, "eps unused"),
        (c_void_p, "x y residual normed room"),
        (c_long, "n threads next"),
    )


def filled(structure: Any, **fields: Any) -> Any:
    """The structure, with these fields set; tensors stand for their addresses, and must outlive it."""
    for name, value in fields.items():
        assert hasattr(structure, name), name
        setattr(structure, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
    return structure


def plain(*tensors: torch.Tensor) -> bool:
    """Whether C may look at their memory: on the CPU, and nobody traces, maps or derives them."""
    return (
        not torch.compiler.is_compiling()
        and all(
            type(t) in (torch.Tensor, torch.nn.Parameter)
            and t.is_cpu
            and not (t.requires_grad and torch.is_grad_enabled())
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
            for t in tensors
        )
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch.autograd.forward_ad._current_level < 0
    )
