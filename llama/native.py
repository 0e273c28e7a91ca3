"""What native.c does, which setup.py compiles where there is a C compiler: products of a few rows, and whole decode steps.

Where there is none, or another CPU, the same is done without it, slower. In bfloat16 and int8 it gives the same to the last
bit. The structures are native.c's and explained there.
"""

import ctypes
import importlib.util
from ctypes import c_float, c_long, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

MOST = 16  # rows of a product: from there on other kernels are as fast
BF16, INT8, INT4 = range(3)


def _fields(*kinds: tuple[Any, str]) -> Any:
    return [(name, kind) for kind, names in kinds for name in names.split()]


class Rows(ctypes.Structure):
    _fields_ = _fields((c_void_p, "x weight y"), (c_float, "eps unused"), (c_long, "n width next"))


class Product(ctypes.Structure):
    _fields_ = _fields(
        (c_long, "kind"),
        (c_void_p, "weight scales sums groups"),
        (c_long, "group in_ out gated"),
        (c_void_p, "norm"),
        (c_float, "eps unused"),
        (c_void_p, "x y residual largest normed room"),
        (c_long, "n threads next"),
    )


class Attention(ctypes.Structure):
    _fields_ = _fields(
        (c_void_p, "q turns keys values at scores y"),
        (c_long, "n K G hd slots q_stride row_stride head_stride next"),
    )


def _compiled() -> tuple[ctypes.CDLL, Any] | None:
    """What setup.py made, and what runs a function on each of PyTorch's own threads."""
    spec = importlib.util.find_spec("._native", __package__)
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        found, serves = (c_long * 4).in_dll(library, "interface"), library.serves()
        parallel = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).GOMP_parallel
    except (AttributeError, OSError, ValueError):  # made from another native.c; or PyTorch has threads of another kind
        return None
    fits = list(found) == [1, *map(ctypes.sizeof, (Rows, Product, Attention))] and serves
    return (library, parallel) if fits else None


COMPILED = _compiled()


def call(name: str, *args: Any) -> None:
    assert COMPILED is not None
    library, parallel = COMPILED
    getattr(library, name)(parallel, c_uint(torch.get_num_threads()), *args)


def rows_taken(x: torch.Tensor) -> bool:
    """Whether `normalized` and `gated` take x."""
    if COMPILED is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.dtype == torch.bfloat16 and x.is_cpu and x.is_contiguous() and x.shape[-1] % 32 == 0


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., width) as `RMSNorm` has it."""
    y = torch.empty_like(x)
    n, width = x.numel() // x.shape[-1], x.shape[-1]
    rows = Rows(x=x.data_ptr(), weight=weight.data_ptr(), y=y.data_ptr(), eps=eps, n=n, width=width)
    call("rows", ctypes.byref(rows))
    return y


def gated(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2 * width): silu of the first half times the second, (..., width)."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    call("rows", ctypes.byref(Rows(x=x.data_ptr(), y=y.data_ptr(), n=y.numel() // width, width=width)))
    return y


class Few:
    """x (n, in) -> (n, out) in bfloat16, for MOST rows or fewer and a weight that another kernel has packed and keeps."""

    def __init__(self, kind: int, in_features: int, out_features: int, *kept: torch.Tensor, **fields: int) -> None:
        self.in_features, self.out_features, self.kept = in_features, out_features, kept
        self.product = Product(kind=kind, in_=in_features, out=out_features, **fields)

    @staticmethod
    def bf16(blocks: torch.Tensor) -> "Few | None":
        """For what oneDNN packed."""
        out, width = blocks.shape
        if COMPILED is None or width % 2:
            return None
        return Few(BF16, width, out, blocks, weight=torch.ops.mkldnn.data_ptr(blocks))

    @staticmethod
    def int8(blocks: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor) -> "Few | None":
        """For what oneDNN packed, with the scale and the sum of each output."""
        width, out = blocks.shape
        if COMPILED is None or width % 64:
            return None
        scale, sums = (F.pad(t, (0, -out % 64)) for t in (scale, sums.int()))
        weight = torch.ops.mkldnn.data_ptr(blocks)
        return Few(INT8, width, out, blocks, scale, sums, weight=weight, scales=scale.data_ptr(), sums=sums.data_ptr())

    @staticmethod
    def int4(blocks: torch.Tensor, groups: torch.Tensor, width: int, out: int) -> "Few | None":
        """For what PyTorch packed in blocks of 64 outputs, with scales and zeros (groups, out, 2)."""
        if COMPILED is None or groups.dtype != torch.bfloat16:
            return None
        fields = {"weight": blocks.data_ptr(), "groups": groups.data_ptr(), "group": width // len(groups)}
        return Few(INT4, width, out, blocks, groups, **fields)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is what it reads; what is not goes another way, where errors are raised."""
        few = x.ndim == 2 and len(x) <= MOST and x.shape[1] == self.in_features and x.dtype == torch.bfloat16
        return few and x.is_cpu and x.is_contiguous() and not torch.compiler.is_compiling()

    def __call__(self, x: torch.Tensor, largest: torch.Tensor | None = None) -> torch.Tensor:
        """`largest`: int8's largest number of each row (n, 1), where these are parts of rows."""
        y, room = x.new_empty(len(x), self.out_features), self.room(len(x))
        largest = None if largest is None else largest.float()
        product = self.then(n=len(x), x=x, y=y, largest=largest, room=room)
        call("multiply", ctypes.byref(product))
        return y

    def then(self, **fields: Any) -> Product:
        """The product with more of its fields set; tensors stand for their addresses, and must outlive it."""
        product = Product.from_buffer_copy(self.product)
        for name, value in fields.items():
            setattr(product, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
        return product

    def room(self, n: int) -> torch.Tensor | None:
        if self.product.kind == BF16:
            return None
        return torch.empty(n * (self.in_features + 4), dtype=torch.uint8, device="cpu")


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_one` does."""
    if COMPILED is None or not (q.is_cpu and q.dtype == k.dtype == v.dtype == torch.bfloat16) or torch.compiler.is_compiling():
        return False
    hd = q.shape[-1]
    return hd % 32 == 0 and k.stride() == v.stride() and k.stride()[2:] == (hd, 1) and not q.requires_grad


def attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, K, G, hd) over k and v (B, K, L, hd) -> (B, K, G, hd)."""
    B, K, G, hd = q.shape
    q, y, L = q.contiguous(), q.new_empty(B, K, G, hd), k.shape[2]
    at = torch.tensor([(row, L - 1) for row in range(B)], dtype=torch.int64, device="cpu")
    scores = torch.empty(B * K * G * L, dtype=torch.float32, device="cpu")
    tensors = {"q": q, "keys": k, "values": v, "at": at, "scores": scores, "y": y}
    sizes = {"n": B, "K": K, "G": G, "hd": hd, "slots": L, "q_stride": K * G * hd}
    strides = {"row_stride": k.stride(0), "head_stride": k.stride(1)}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    call("attend", ctypes.byref(Attention(**addresses, **sizes, **strides)))
    return y
