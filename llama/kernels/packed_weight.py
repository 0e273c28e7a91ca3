"""Tensor subclass that makes a packed weight usable as a parameter of an ordinary module.

A `PackedWeight` (out, in) has no memory for values. It represents all or some rows of the weight that a linear kernel stores:

    F.linear(x, weight)              calls the kernel
    weight.float(), 2 * weight       uses a plain copy of the weight, dequantized if necessary
    weight.mul_(2), weight[0] = x    changes a plain copy of the weight, then packs the copy (quantized if necessary)
    weight[0], weight.t()            raises InputError: a packed weight cannot have views
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
    """A linear kernel for a weight (out, in). Several instances of PackedWeight may share it, each with some of the rows."""

    n_edits = 0  # calls of `replace` on all kernels, counted to detect changes: packed weights have no `_version`

    def __init__(self, kernel: LinearKernel, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.kernel, self.shape, self.dtype, self.device = kernel, shape, dtype, device
        self.computes_logits = False
        self.row_kernels: dict[tuple[int, int], LinearKernel | None] = {}  # cached results of `rows`

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_shared, (self.kernel, self.shape, self.dtype, self.device, self.computes_logits)

    def use_highest_precision(self) -> None:
        """Make the kernel compute as precisely as it can from now on; logits need more precision."""
        self.computes_logits = True
        self.kernel.use_highest_precision()
        self.row_kernels = {}

    def rows(self, first: int, last: int) -> LinearKernel | None:
        """Return a kernel for rows `first` to `last` - 1 only, or None if a copy would be needed."""
        if (first, last) == (0, self.shape[0]):
            return self.kernel
        if (first, last) not in self.row_kernels:
            self.row_kernels[first, last] = self.kernel.rows(first, last)
        return self.row_kernels[first, last]

    def replace(self, first: int, last: int, rows: torch.Tensor) -> None:
        """Replace the values of rows `first` to `last` - 1 by `rows` (last - first, in), and pack the weight again."""
        weight = self.kernel.unpack()
        if isinstance(weight, QuantizedWeight):
            assert not weight.padding_before or (first, last) == (0, self.shape[0]), "rows with padding are replaced as a whole"
            new_rows = quantize(rows.to(self.device), weight.format, weight.dtype)
            parts = weight.slice_outputs(0, first), new_rows, weight.slice_outputs(last, self.shape[0])
            weight = QuantizedWeight.cat([part for part in parts if len(part.values)])
        else:
            weight = weight.clone()
            weight[first:last] = rows
        if isinstance(self.kernel, BlockedLinear) and isinstance(weight, torch.Tensor):
            # Keep the block format even for a small weight, which `pack_weight` would leave unpacked.
            self.kernel = BlockedLinear(BlockedWeight.from_dense(weight), self.dtype)
        else:
            kernel = pack_weight(weight)
            assert kernel is not None
            self.kernel = kernel
        self.row_kernels = {}
        if self.computes_logits:
            self.use_highest_precision()
        SharedKernel.n_edits += 1


def _unpickle_shared(
    kernel: Any, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, computes_logits: bool
) -> SharedKernel:
    """Rebuild a copied or pickled SharedKernel; `kernel` is an unpacked weight if this machine has no kernel for it."""
    shared = SharedKernel(kernel, shape, dtype, device)
    if computes_logits and isinstance(kernel, LinearKernel):
        shared.use_highest_precision()
    return shared


class PackedWeight(torch.Tensor):
    """A weight (last - first, in) whose values are rows `first` to `last` - 1 of a SharedKernel."""

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
        """Return x (..., in) times the weight, shaped (..., out)."""
        part = self.shared.rows(self.first, self.last)
        return part.forward(x) if part else self.shared.kernel.forward(x)[..., self.first : self.last]

    def dequantize(self) -> torch.Tensor:
        """Return a copy of the weight as a plain tensor (out, in)."""
        part = self.shared.rows(self.first, self.last)
        return part.dequantize() if part else self.shared.kernel.dequantize()[self.first : self.last].clone()

    def assign(self, values: torch.Tensor) -> None:
        """Replace all values by the values of a plain tensor (out, in)."""
        self.shared.replace(self.first, self.last, values)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        result = handler(*args, **(kwargs or {})) if handler else NotImplemented
        if result is not NotImplemented:
            return result
        with compat.without_torch_function():  # prevents results from becoming packed weights
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return _alias(args[0])
        # In inference mode, PyTorch passes composite operations here; `decompose` splits them into basic operations.
        result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        plain_values = {}  # arguments by name, with plain copies in place of packed weights
        written: list[tuple[Any, Any]] = []  # (packed weight, plain copy) pairs that the operation changes
        for argument in func._schema.arguments:
            value = values.get(argument.name)
            plain_value = plain_values[argument.name] = tree_map(_to_plain, value)
            if argument.alias_info is None:
                continue
            leaves = zip(tree_leaves(value), tree_leaves(plain_value), strict=True)
            copied = [(weight, plain_copy) for weight, plain_copy in leaves if weight is not plain_copy]
            if copied and not argument.alias_info.is_write:
                raise InputError(f"{func} makes a view, and a packed weight cannot have views: {USE_EAGER}")
            written += copied
        positional = [plain_values[argument.name] for argument in func._schema.arguments[: len(args)]]
        result = func(*positional, **{name: plain_values[name] for name in kwargs or {}})
        for weight, plain_copy in written:
            weight.assign(plain_copy)
        for weight, plain_copy in written:
            if result is plain_copy:
                return weight
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _unpickle_parameter(copy.deepcopy(self.shared, memo), self.first, self.last)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self, nn.Parameter):
            return _unpickle_parameter, (self.shared, self.first, self.last)
        return self.dequantize().__reduce_ex__(protocol)  # a packed weight in a state_dict is saved as a plain tensor

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)}, {self.shared.kernel.format or self.dtype})"


def _to_plain(value: Any) -> Any:
    """Return a plain copy of a packed weight, and any other value unchanged."""
    return value.dequantize() if isinstance(value, PackedWeight) else value


def _alias(weight: PackedWeight) -> PackedWeight:
    """Return another PackedWeight for the same rows of the same kernel."""
    with torch.inference_mode(False):
        return PackedWeight(weight.shared, weight.first, weight.last)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """Compute `F.linear` with the weight's kernel."""
    if not isinstance(weight, PackedWeight):
        return NotImplemented
    y = weight.linear(input)
    if torch.is_autocast_enabled(input.device.type):  # F.linear with a plain weight also returns autocast's dtype
        y = y.to(torch.get_autocast_dtype(input.device.type))
    return y if bias is None else y + bias


def _set_item(weight: Any, index: Any, value: Any) -> Any:
    """Set `weight[index] = value` in a plain copy of the weight, and pack the copy."""
    if not isinstance(weight, PackedWeight):
        return NotImplemented
    values = weight.dequantize()
    values[index] = _to_plain(value)
    weight.assign(values)


def _set_data(weight: Any, data: Any) -> Any:
    """Allow `weight.data = data` if both are the same rows of one kernel, as in `Module.to`; otherwise raise InputError."""
    storages = [(t.shared, t.first, t.last) if isinstance(t, PackedWeight) else t for t in (weight, data)]
    if storages[0] != storages[1]:
        raise InputError(f"the data of a packed weight cannot be another tensor; copy_ values into it, or {USE_EAGER}")


def _requires_grad(weight: Any, requires_grad: bool = True) -> Any:
    """Raise InputError for requires_grad=True, because kernels compute no gradients."""
    if requires_grad:
        raise InputError(f"a packed weight has no gradient: to train, {USE_EAGER}")
    return weight


def _may_take_data(weight: Any, data: Any) -> Any:
    """Return True if both tensors are packed. Otherwise `Module.to` must create a new parameter."""
    return isinstance(weight, PackedWeight) and isinstance(data, PackedWeight)


# Functions that replace PyTorch functions for packed weights. They return NotImplemented if the weight is not packed.
_HANDLERS: dict[Any, Any] = {
    compat.may_take_data: _may_take_data,
    F.linear: _linear,
    # `detach` is replaced here because the first call of __torch_dispatch__ imports PyTorch's distributed tensors, which takes
    # 0.7 seconds and 40 MB.
    torch.Tensor.detach: _alias,
    torch.Tensor.data.__get__: _alias,  # type: ignore[attr-defined]
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__set__: _requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _requires_grad,
}


def _unpickle_parameter(shared: SharedKernel, first: int, last: int) -> nn.Parameter:
    """Rebuild a copied or pickled parameter. The parameter is a plain tensor if this machine cannot pack the weight."""
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
    pack: bool = True,
    computes_logits: bool = False,
) -> list[nn.Parameter]:
    """Split one weight (sum(outs), in) by rows into parameters (out, in), one for each `out` in `outs`.

    pack: pack the weight for the fastest kernel. If False, or if a plain tensor is the fastest, the parameters are views of the
        weight.
    computes_logits: make the kernel compute products as precisely as it can.
    """
    kernel = weight if isinstance(weight, LinearKernel) else pack_weight(weight) if pack else None
    if kernel is None:
        assert isinstance(weight, torch.Tensor)
        return [nn.Parameter(part, requires_grad=False) for part in weight.split(list(outs))]
    shared, parameters, first = SharedKernel(kernel, (sum(outs), in_features), dtype, device), [], 0
    if computes_logits:
        shared.use_highest_precision()
    for out in outs:
        parameters.append(nn.Parameter(PackedWeight(shared, first, first + out), requires_grad=False))
        first += out
    return parameters


def merge_weights(weights: Sequence[torch.Tensor]) -> LinearKernel | torch.Tensor | None:
    """Join the rows of all weights, in order, into one tensor or kernel; return None if a copy would be needed."""
    first = weights[0]
    if isinstance(first, PackedWeight):
        if len(weights) == 1:
            return first.shared.rows(first.first, first.last)
        ends = [0, *(w.last if isinstance(w, PackedWeight) and w.shared is first.shared else -1 for w in weights)]
        starts = [w.first if isinstance(w, PackedWeight) else -1 for w in weights]
        return first.shared.kernel if starts == ends[:-1] and ends[-1] == first.shared.shape[0] else None
    if len(weights) == 1:
        return compat.detach(first)
    address = first.data_ptr()
    for weight in weights:
        matches = (weight.dtype, weight.device, weight.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        if isinstance(weight, PackedWeight) or not weight.is_contiguous() or not matches or weight.data_ptr() != address:
            return None
        address += weight.nbytes
    rows, width = sum(map(len, weights)), first.shape[1]
    if first.untyped_storage().data_ptr() != weights[-1].untyped_storage().data_ptr():
        return None
    return compat.detach(first).as_strided((rows, width), (width, 1))
