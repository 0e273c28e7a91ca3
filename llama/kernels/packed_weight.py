"""Weights that a kernel holds in its own form, as parameters of ordinary modules.

A `PackedWeight` is a tensor (out, in) without memory of its own: some rows, or all, of what a kernel multiplies by.

    F.linear(x, weight)          the kernel's product
    weight.float(), 2 * weight   computed from a plain copy; a quantized weight is dequantized
    weight.mul_(2), weight[0]=x  the copy is changed and packed again; quantized rows are quantized again
    weight[0], weight.t()        refused: what is written to a view would be lost
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import compat
from ..errors import InputError
from ..quantization.quantize import quantize
from ..quantization.weight import QuantizedWeight
from .base import LinearKernel
from .blocked_linear import BlockedLinear, BlockedWeight
from .packing import pack_weight

USE_EAGER = 'build with backend="eager", which keeps plain tensors'


class SharedKernel:
    """A kernel (out, in), and how to change rows of it: all weights that are parts of it see the change."""

    n_edits = 0  # edits of any kernel so far, of which no tensor has a version

    def __init__(self, kernel: LinearKernel, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.kernel, self.shape, self.dtype, self.device = kernel, shape, dtype, device
        self.logits = False
        self.parts: dict[tuple[int, int], LinearKernel | None] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_shared, (self.kernel, self.shape, self.dtype, self.device, self.logits)

    def use_highest_precision(self) -> None:
        """Multiply as exactly as the kernel can from now on."""
        self.logits = True
        self.kernel.use_highest_precision()
        self.parts = {}

    def rows(self, first: int, last: int) -> LinearKernel | None:
        """Return a kernel of the rows first..last alone, None where that takes a copy."""
        if (first, last) == (0, self.shape[0]):
            return self.kernel
        if (first, last) not in self.parts:
            self.parts[first, last] = self.kernel.rows(first, last)
        return self.parts[first, last]

    def replace(self, first: int, last: int, rows: torch.Tensor) -> None:
        """Pack other values (last - first, in) in place of the rows first..last; the others stay as they are."""
        held = self.kernel.unpack()
        if isinstance(held, QuantizedWeight):
            new = quantize(rows.to(self.device), held.format, held.dtype)
            parts = held.slice_outputs(0, first), new, held.slice_outputs(last, self.shape[0])
            held = QuantizedWeight.cat([part for part in parts if len(part.values)])
        else:
            held = held.clone()
            held[first:last] = rows
        if isinstance(self.kernel, BlockedLinear) and isinstance(held, torch.Tensor):  # however small
            self.kernel = BlockedLinear(BlockedWeight.from_dense(held), self.dtype)
        else:
            kernel = pack_weight(held)
            assert kernel is not None
            self.kernel = kernel
        self.parts = {}
        if self.logits:
            self.use_highest_precision()
        SharedKernel.n_edits += 1


def _unpickle_shared(
    kernel: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, logits: bool
) -> SharedKernel:
    made = SharedKernel(kernel, shape, dtype, device)
    if logits and isinstance(kernel, LinearKernel):
        made.use_highest_precision()
    return made


class PackedWeight(torch.Tensor):
    """The rows first..last of a shared kernel."""

    shared: SharedKernel
    first: int
    last: int

    @staticmethod
    def __new__(cls, shared: SharedKernel, first: int, last: int) -> "PackedWeight":
        self = compat.make_wrapper_tensor(cls, (last - first, shared.shape[1]), shared.dtype, shared.device)
        self.shared, self.first, self.last = shared, first, last
        return self

    def __init__(self, shared: SharedKernel, first: int, last: int) -> None:
        pass

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        part = self.shared.rows(self.first, self.last)
        return part.forward(x) if part else self.shared.kernel.forward(x)[..., self.first : self.last]

    def dequantize(self) -> torch.Tensor:
        """Return a plain copy."""
        part = self.shared.rows(self.first, self.last)
        return part.dequantize() if part else self.shared.kernel.dequantize()[self.first : self.last].clone()

    def assign(self, values: torch.Tensor) -> None:
        self.shared.replace(self.first, self.last, values)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _FUNCTIONS.get(func)
        result = own(*args, **(kwargs or {})) if own else NotImplemented
        if result is not NotImplemented:
            return result
        with compat.without_torch_function():  # results are plain tensors, not of this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return _alias(args[0])
        result = func.decompose(*args, **(kwargs or {}))  # of a composite, which inference mode does not take apart
        if result is not NotImplemented:
            return result
        values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written: list[tuple[Any, Any]] = []  # packed weights that the operation writes to, and the copies that it is given
        given = {}
        for argument in func._schema.arguments:
            value = values.get(argument.name)
            copies = given[argument.name] = tree_map(_plain, value)
            if argument.alias_info is None:
                continue
            pairs = [(old, new) for old, new in zip(tree_leaves(value), tree_leaves(copies), strict=True) if old is not new]
            if pairs and not argument.alias_info.is_write:
                raise InputError(
                    f"{func} makes a view of a packed weight, and what is written to a view would be lost: {USE_EAGER}"
                )
            written += pairs
        positional = [given[argument.name] for argument in func._schema.arguments[: len(args)]]
        result = func(*positional, **{name: given[name] for name in kwargs or {}})
        for weight, copy_ in written:
            weight.assign(copy_)
        for weight, copy_ in written:
            if result is copy_:
                return weight
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _unpickle_parameter(copy.deepcopy(self.shared, memo), self.first, self.last)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self, nn.Parameter):
            return _unpickle_parameter, (self.shared, self.first, self.last)
        return self.dequantize().__reduce_ex__(protocol)  # a state_dict is saved as plain tensors

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.shared.kernel.format or self.dtype})"


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, PackedWeight) else value


def _alias(weight: PackedWeight) -> PackedWeight:
    with torch.inference_mode(False):
        return PackedWeight(weight.shared, weight.first, weight.last)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, PackedWeight):
        return NotImplemented
    y = weight.linear(input)
    if torch.is_autocast_enabled(input.device.type):  # as of a plain weight's product
        y = y.to(torch.get_autocast_dtype(input.device.type))
    return y if bias is None else y + bias


def _set_item(weight: Any, index: Any, value: Any) -> Any:
    if not isinstance(weight, PackedWeight):
        return NotImplemented
    values = weight.dequantize()
    values[index] = _plain(value)
    weight.assign(values)


def _set_data(weight: Any, data: Any) -> Any:
    same = [(t.shared, t.first, t.last) if isinstance(t, PackedWeight) else t for t in (weight, data)]
    if same[0] != same[1]:
        raise InputError(f"the data of a packed weight cannot be another tensor; copy_ values into it, or {USE_EAGER}")


def _requires_grad(weight: Any, requires_grad: bool = True) -> Any:
    if requires_grad:
        raise InputError(f"a packed weight takes no gradient: to train, {USE_EAGER}")
    return weight


def _may_take_data(weight: Any, data: Any) -> Any:
    """Have `Module.to` make a new parameter unless both tensors are packed."""
    return isinstance(weight, PackedWeight) and isinstance(data, PackedWeight)


_FUNCTIONS: dict[Any, Any] = {
    compat.may_take_data: _may_take_data,
    F.linear: _linear,
    # Here, not by __torch_dispatch__: at the first call of that PyTorch imports its distributed tensors, 40 MB in 0.7 seconds.
    torch.Tensor.detach: _alias,
    torch.Tensor.data.__get__: _alias,  # type: ignore[attr-defined]
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _requires_grad,
}


def _unpickle_parameter(shared: SharedKernel, first: int, last: int) -> nn.Parameter:
    """Return a copied or unpickled weight; a plain tensor if this machine cannot pack it."""
    if isinstance(shared.kernel, torch.Tensor):
        return nn.Parameter(shared.kernel[first:last], requires_grad=False)
    if isinstance(shared.kernel, QuantizedWeight):
        return nn.Parameter(shared.kernel.slice_outputs(first, last).dequantize(), requires_grad=False)
    return nn.Parameter(PackedWeight(shared, first, last), requires_grad=False)


def make_parameters(
    weight: torch.Tensor | QuantizedWeight | LinearKernel,
    outs: Sequence[int],
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    packs: bool = True,
    logits: bool = False,
) -> list[nn.Parameter]:
    """Split one weight (sum of outs, in) into parameters (out, in): packed for the fastest kernel if `packs`, else views.
    logits: it computes logits, so the kernel multiplies as exactly as it can."""
    kernel = weight if isinstance(weight, LinearKernel) else pack_weight(weight) if packs else None
    if kernel is None:
        assert isinstance(weight, torch.Tensor)
        return [nn.Parameter(part, requires_grad=False) for part in weight.split(list(outs))]
    shared, made, first = SharedKernel(kernel, (sum(outs), in_features), dtype, device), [], 0
    if logits:
        shared.use_highest_precision()
    for out in outs:
        made.append(nn.Parameter(PackedWeight(shared, first, first + out), requires_grad=False))
        first += out
    return made


def merge_weights(weights: Sequence[torch.Tensor]) -> LinearKernel | torch.Tensor | None:
    """Return the weight (sum of outs, in) of which these are the parts in order, without a copy; None if there is none."""
    first = weights[0]
    if isinstance(first, PackedWeight):
        if len(weights) == 1:
            return first.shared.rows(first.first, first.last)
        ends = [0, *(w.last if isinstance(w, PackedWeight) and w.shared is first.shared else -1 for w in weights)]
        starts = [w.first if isinstance(w, PackedWeight) else -1 for w in weights]
        return first.shared.kernel if starts == ends[:-1] and ends[-1] == first.shared.shape[0] else None
    if len(weights) == 1:
        return first.detach()
    address = first.data_ptr()
    for weight in weights:
        alike = (weight.dtype, weight.device, weight.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        if isinstance(weight, PackedWeight) or not weight.is_contiguous() or not alike or weight.data_ptr() != address:
            return None
        address += weight.nbytes
    rows, width = sum(map(len, weights)), first.shape[1]
    if first.untyped_storage().data_ptr() != weights[-1].untyped_storage().data_ptr():
        return None
    return first.detach().as_strided((rows, width), (width, 1))
