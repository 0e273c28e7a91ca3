"""What native.c does, which setup.py compiles where there is a C compiler: products of a few rows, and whole decode steps.

Where there is none, or another CPU, the same is done without it, slower. In bfloat16 and int8 it gives the same to the last
bit, except that numbers too small for bfloat16's normal form become 0. The structures are native.c's and explained there.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_long, c_void_p
from typing import Any

import torch
import torch.nn.functional as F

from . import library, widened
from .library import fields, filled, load
from .runtime import HUGE_PAGES

MOST = 16  # rows of a product: from there on other kernels are as fast
LOOKED_AT = 4  # weights of each shape, whether they are multiplied as oneDNN does
BF16, INT8, INT4 = range(3)


class Rows(ctypes.Structure):
    _fields_ = fields((c_long, "gated"), (c_void_p, "x weight y"), (c_float, "eps unused"), (c_long, "n width next"))


class Product(ctypes.Structure):
    _fields_ = fields(
        (c_long, "kind"),
        (c_void_p, "weight scales sums groups"),
        (c_long, "group chunk in_ out gated"),
        (c_void_p, "norm"),
        (c_float, "eps unused"),
        (c_void_p, "x y residual largest normed room"),
        (c_long, "n threads next"),
    )


class Attention(ctypes.Structure):
    _fields_ = fields(
        (c_void_p, "q turns keys values at scores y"),
        (c_long, "n K G hd slots q_stride row_stride head_stride next"),
    )


FUNCTIONS: dict[str, list[Any]] = {
    "rows": [Rows],
    "multiply": [Product],
    "attend": [Attention],
    "layers": [Product, Attention, c_long],
}
COMPILED = load("native", [Rows, Product, Attention], FUNCTIONS) if widened.native(torch.bfloat16) else None


def call(name: str, *args: Any) -> None:
    assert COMPILED is not None
    COMPILED.call(name, *args)


def plain(*tensors: torch.Tensor) -> bool:
    """Whether native.c may look at their memory, and reads their numbers."""
    return COMPILED is not None and all(t.dtype == torch.bfloat16 for t in tensors) and library.plain(*tensors)


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_one` does: q (B, K, G, hd), k and v (B, K, L, hd) with the slots side by side."""
    (B, K, _, hd), same = q.shape, k.shape == v.shape and k.stride() == v.stride()
    fits = same and k.shape[:2] == (B, K) and k.shape[3] == hd and hd % 32 == 0 and k.stride()[2:] == (hd, 1)
    return fits and plain(q, k, v)


def attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, K, G, hd) over k and v (B, K, L, hd) -> (B, K, G, hd)."""
    B, K, G, hd = q.shape
    q, y, L = q.contiguous(), q.new_empty(B, K, G, hd), k.shape[2]
    at = torch.tensor([(row, L - 1) for row in range(B)], dtype=torch.int64, device="cpu")
    scores = torch.empty(B * K * G * L, dtype=torch.float32, device="cpu")
    tensors = {"q": q, "keys": k, "values": v, "at": at, "scores": scores, "y": y}
    sizes = {"n": B, "K": K, "G": G, "hd": hd, "slots": L, "q_stride": K * G * hd}
    strides = {"row_stride": k.stride(0), "head_stride": k.stride(1)}
    call("attend", ctypes.byref(filled(Attention(), **tensors, **sizes, **strides)))
    return y


def rows_taken(x: torch.Tensor, width: int, *weights: torch.Tensor) -> bool:
    """Whether `normalized` takes x (..., width) and a weight (width), or `gated` x alone."""
    each = all(weight.shape == (width,) and weight.is_contiguous() for weight in weights)
    return each and width > 0 and width % 16 == 0 and x.is_contiguous() and plain(x, *weights) and not torch.is_grad_enabled()


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., width) as `RMSNorm` has it."""
    y, width = torch.empty_like(x), len(weight)
    call("rows", ctypes.byref(filled(Rows(), x=x, weight=weight, y=y, eps=eps, n=x.numel() // width, width=width)))
    return y


def gated(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2 * width): silu of the first half times the second, (..., width)."""
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    call("rows", ctypes.byref(filled(Rows(), gated=1, x=x, y=y, n=y.numel() // width, width=width)))
    return y


def lies(blocks: torch.Tensor, weight: torch.Tensor, inputs: int) -> bool:
    """Whether oneDNN put a weight (out, in) into blocks of 64 outputs, (out / 64, in / inputs, 64, inputs), as native.c reads
    them: the first two and the last are looked at. In 8 bits it does unless there are more threads than such blocks."""
    out, width = weight.shape
    number = torch.int8 if weight.dtype == torch.int8 else torch.int16
    size, address = torch.ops.mkldnn._nbytes(blocks), torch.ops.mkldnn.data_ptr(blocks)
    n_blocks = -(-out // 64)
    if width % inputs or size < n_blocks * 64 * width * number.itemsize:
        return False
    memory = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.int8)
    memory = memory[: n_blocks * 64 * width * number.itemsize].view(number).view(n_blocks, width // inputs, 64, inputs)
    for b in {0, min(1, n_blocks - 1), n_blocks - 1}:
        wanted = weight[64 * b : 64 * (b + 1)].view(number)
        wanted = F.pad(wanted, (0, 0, 0, 64 - len(wanted))).view(64, -1, inputs).transpose(0, 1)
        if not torch.equal(memory[b], wanted):
            return False
    return True


def order_probe(weight: torch.Tensor) -> torch.Tensor:
    """Rows x (MOST, in) whose products with the first outputs of a weight (out, in) all but cancel. What is left of these is
    what rounding made of the sums, which tells one order from another; of other products one in ten thousand does."""
    x = torch.empty(MOST, weight.shape[1], dtype=torch.float32, device="cpu").normal_(
        generator=torch.Generator().manual_seed(0)
    )
    some = weight[: min(64, weight.shape[1] // 4)].float()
    if some.isfinite().all():  # else there is nothing to compare
        x -= x @ torch.linalg.pinv(some) @ some
    return x.bfloat16()


_ORDERS: dict[tuple[int, int, int], list[dict[str, int]]] = {}  # found for each kind and shape


class Few:
    """x (n, in) -> (n, out) in bfloat16, for MOST rows or fewer and a weight that another kernel has packed and keeps."""

    orders: Sequence[dict[str, int]] = ({},)  # in which what it stands for may sum

    def __init__(self, kind: int, in_features: int, out_features: int, *kept: torch.Tensor, **fields: Any) -> None:
        self.in_features, self.out_features, self.kept = in_features, out_features, kept
        self.product = filled(Product(), kind=kind, in_=in_features, out=out_features, **fields)

    @staticmethod
    def bf16(blocks: torch.Tensor, weight: torch.Tensor) -> "Few | None":
        """For a weight (out, in) that oneDNN packed."""
        if COMPILED is None or not lies(blocks, weight, 2):
            return None
        width, address = weight.shape[1], torch.ops.mkldnn.data_ptr(blocks)
        made = Few(BF16, width, len(weight), blocks, weight=address, chunk=1024)
        # In older versions of oneDNN chunks are equal.
        divisor = next((n for n in range(1024, 0, -16) if width % n == 0), 1024)
        made.orders = [{"chunk": n} for n in dict.fromkeys((512 if width <= 1024 else 1024, 1024, divisor))]
        return made

    @staticmethod
    def int8(blocks: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> "Few | None":
        """For numbers (out, in) that oneDNN packed, with the scale of each output, (out)."""
        if COMPILED is None or q.shape[1] % 64 or not lies(blocks, q, 4):
            return None
        out, width = q.shape
        scales, sums = (F.pad(t, (0, -out % 64)) for t in (scale, q.sum(1, dtype=torch.int32)))
        address = torch.ops.mkldnn.data_ptr(blocks)
        return Few(INT8, width, out, blocks, scales, sums, weight=address, scales=scales, sums=sums)

    @staticmethod
    def int4(blocks: torch.Tensor, groups: torch.Tensor, width: int, out: int) -> "Few | None":
        """For what PyTorch packed in blocks of 64 outputs, with scales and zeros (groups, out, 2). Of these it keeps a copy as
        (out / 64, groups, 64, 2): what belongs together lies side by side."""
        if COMPILED is None or groups.dtype != torch.bfloat16:
            return None
        beside = HUGE_PAGES.room(groups.shape[1] // 64, len(groups), 64, 2, dtype=torch.bfloat16)
        beside.copy_(groups.unflatten(1, (-1, 64)).transpose(0, 1))
        return Few(INT4, width, out, blocks, beside, weight=blocks, groups=beside, group=width // len(groups))

    def agreeing(self, multiply: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> "Few | None":
        """This, summing in the order in which it gives to the last bit what oneDNN does, by `multiply`; or None if in
        none. The order is oneDNN's own affair, decided by its version, the CPU and the weight's shape: of each shape the first
        weights are looked at."""
        found = _ORDERS.setdefault((self.product.kind, self.in_features, self.out_features), [])
        if len(found) < LOOKED_AT:
            x = order_probe(weight)
            wanted = multiply(x)
            order = next((o for o in self.orders if torch.equal(self.set(**o)(x), wanted)), None)
            if order is None:
                return None
            found.append(order)
        return self.set(**found[-1])

    def set(self, **fields: int) -> "Few":
        filled(self.product, **fields)
        return self

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is what it reads; what is not goes another way, where errors are raised."""
        few = x.ndim == 2 and len(x) <= MOST and x.shape[1] == self.in_features
        return few and x.is_contiguous() and plain(x)

    def __call__(self, x: torch.Tensor, largest: torch.Tensor | None = None) -> torch.Tensor:
        """`largest`: int8's largest number of each row (n, 1), where these are parts of rows."""
        n, kept = len(x), None if largest is None else largest.float()
        y, room = x.new_empty(n, self.out_features), torch.empty(self.room(n), dtype=torch.uint8, device="cpu")
        call("multiply", ctypes.byref(self.filled(n=n, x=x, y=y, largest=kept, room=room)))
        return y

    def filled(self, **fields: Any) -> Product:
        """The product, with more of its fields set."""
        return filled(Product.from_buffer_copy(self.product), **fields)

    def room(self, n: int) -> int:
        """Bytes that n rows need."""
        return 0 if self.product.kind == BF16 else n * (self.in_features + 4)
