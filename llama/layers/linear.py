"""Tensor-parallel linear layers: subclasses of fairscale's layers that allocate only the part of the weight that a rank uses.

The constructors of fairscale build the whole matrix on every rank. They also ignore the default device, so that a model cannot
be built on `meta`. The subclasses keep the groups, collectives, arguments and terms of fairscale: column-parallel layers split
the outputs among the ranks, and row-parallel layers split the inputs. With one rank, the layers need no process group.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fs_layers
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from ..distributed.groups import model_parallel
from ..errors import DeviceError, InputError

InitMethod = Callable[[torch.Tensor], Any]


def divide(n: int, ranks: int, what: str) -> int:
    """Return n / ranks. Raise DeviceError if n is not divisible by ranks. what: the name of n in the error message."""
    if n % ranks:
        divisors = ", ".join(str(r) for r in range(1, min(n, 64) + 1) if n % r == 0)
        raise DeviceError(f"{what}: {n} cannot be divided among {ranks} ranks; use one of {divisors}")
    return n // ranks


def small_normal_(weight: torch.Tensor) -> torch.Tensor:
    """Fill a weight with normally distributed values of standard deviation 0.02."""
    return nn.init.normal_(weight, std=0.02)


def make_weight(rows: int, columns: int, init_method: InitMethod) -> nn.Parameter:
    """Return a weight (rows, columns) that needs no gradient. Initialize its values, unless it is on the device `meta`."""
    weight = torch.empty(rows, columns)
    if not weight.is_meta:  # on `meta`, initializing has no effect, but takes 1.5 s to import torch's compiler
        with torch.no_grad():
            init_method(weight)
    return nn.Parameter(weight, requires_grad=False)


def _no_bias(bias: bool) -> None:
    """Raise InputError if `bias` is True."""
    if bias:
        raise InputError("bias=True: the linear layers of Llama 2 have no bias; leave the argument out")


class ColumnParallelLinear(fs_layers.ColumnParallelLinear):
    """Multiply x (..., in) by this rank's rows of the weight: (..., out / ranks).

    With `gather_output`, return the outputs of all ranks: (..., out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        gather_output: bool = True,
        init_method: InitMethod = small_normal_,
    ) -> None:
        nn.Module.__init__(self)
        _no_bias(bias)
        self.in_features, self.out_features, self.gather_output = in_features, out_features, gather_output
        self.ranks = model_parallel()[1]
        self.output_size_per_partition = divide(out_features, self.ranks, "output features of a linear layer")
        self.weight = make_weight(self.output_size_per_partition, in_features, init_method)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ranks == 1:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(copy_to_model_parallel_region(x), self.weight, self.bias)
        # Gathered tensors must have the same dtype. Ranks on different machines may use kernels whose results differ in dtype.
        return gather_from_model_parallel_region(y.float()) if self.gather_output else y


class RowParallelLinear(fs_layers.RowParallelLinear):
    """Multiply x (..., in / ranks) by this rank's columns of the weight. The result (..., out) is the sum over the ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        input_is_parallel: bool = True,
        init_method: InitMethod = small_normal_,
    ) -> None:
        nn.Module.__init__(self)
        _no_bias(bias)
        if not input_is_parallel:
            raise InputError(
                "input_is_parallel=False: every rank must be given only its part of the input; leave the argument out"
            )
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, True
        self.ranks = model_parallel()[1]
        self.input_size_per_partition = divide(in_features, self.ranks, "input features of a linear layer")
        self.weight = make_weight(out_features, self.input_size_per_partition, init_method)
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight)
        y = y if self.ranks == 1 else reduce_from_model_parallel_region(y)
        return y if self.bias is None else y + self.bias
