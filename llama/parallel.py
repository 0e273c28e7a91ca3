"""fairscale's model-parallel layers, made to allocate only what a rank keeps.

fairscale's own constructors build the whole matrix on every rank and ignore the default device, so that a model cannot
be laid out on `meta`. These subclasses keep its groups and collectives, and its meaning of "column" (the output is
split) and "row" (the input is split). With one rank no group is needed.

`multiply` is the one place where a weight meets the kernel that multiplies with it; once loaded, a weight may be held in
that kernel's own form (kernels.py).
"""

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

from .errors import DeviceError
from .kernels import Kernel, pack
from .quantize import Quantized, quantize
from .ranks import model_parallel
from .widened import linear


def divide(n: int, ranks: int, what: str) -> int:
    """n / ranks, or an error that says which numbers of ranks divide it."""
    if n % ranks:
        fitting = ", ".join(str(r) for r in range(1, min(n, 64) + 1) if n % r == 0)
        raise DeviceError(f"{what}: {n} cannot be divided among {ranks} ranks; use one of {fitting}")
    return n // ranks


def _weight(rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    if not weight.is_meta:  # where there is nothing to fill, asking for it would import torch's compiler: 1.5 seconds
        nn.init.normal_(weight, std=0.02)
    return weight


class ParallelLinear(nn.Module):
    in_features: int
    out_features: int
    weight: nn.Parameter | None
    packed: Kernel | None = None
    gather_output = False  # True for the layer that makes logits
    times_held = 0  # by all layers of all models: as it grows, captured steps look whether their weights are still there

    def whole_shapes(self) -> list[tuple[int, int]]:
        """(out, in) of each stored weight that it is made of, on all ranks together."""
        return [(self.out_features, self.in_features)]

    def hold(self, weight: torch.Tensor | Quantized | Kernel) -> None:
        """Take this rank's weight, for inference, in the form that multiplies fastest."""
        self.packed = weight if isinstance(weight, Kernel) else pack(weight)
        if self.packed and self.gather_output:
            self.packed.for_logits()
        ParallelLinear.times_held += 1
        self.weight = nn.Parameter(weight, requires_grad=False) if self.packed is None else None  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.packed, torch.Tensor):  # another machine packed it, and this one does not
            self.hold(self.packed)
        elif self.packed and self.gather_output:
            self.packed.for_logits()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:  # `to` another dtype or device
        if self.packed is None:
            return super()._apply(fn, recurse)
        held = self.packed.held()
        if isinstance(held, Quantized):
            like = fn(torch.empty(0, dtype=held.dtype, device=held.device))
            if (like.device, like.dtype) != (held.device, held.dtype):
                self.hold(held.to(like.device, like.dtype))
        else:
            self.hold(fn(held))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        packed = self.packed
        if packed is not None:
            self.weight, self.packed = nn.Parameter(packed.dense(), requires_grad=False), None
        super()._load_from_state_dict(*args)
        if packed is not None and self.weight is not None:
            weight = self.weight.detach()
            self.hold(quantize(weight, packed.kind) if packed.kind else weight)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out), this rank's part of the product."""
        return self.packed.product(x) if self.packed else linear(x, self.weight)  # type: ignore[arg-type]

    def dense(self) -> torch.Tensor:
        """This rank's weight (out, in), as it was before it was packed; a quantized one as what it stands for."""
        return self.packed.dense() if self.packed else self.weight  # type: ignore[return-value]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.dense()
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()


class ColumnParallelLinear(ParallelLinear, fs_layers.ColumnParallelLinear):
    """x (..., in) -> (..., out), or this rank's (..., out / ranks) without `gather_output`. The weight is split by rows."""

    def __init__(self, in_features: int, out_features: int, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.gather_output = in_features, out_features, gather_output
        self.ranks = model_parallel()[1]
        self.output_size_per_partition = divide(out_features, self.ranks, "output features of a linear layer")
        self.bias = None
        self.weight = _weight(self.output_size_per_partition, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ranks == 1:
            return self.multiply(x)
        y = self.multiply(copy_to_model_parallel_region(x))
        # Kernels differ in the dtype of logits, and machines in their kernels: what ranks send must not.
        return gather_from_model_parallel_region(y.float()) if self.gather_output else y


class JoinedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of one input, multiplied as one: x (..., in) -> (..., sum of outs / ranks).

    `parts` names them and their outs. Each rank holds its part of each, one after the other. In `state_dict` they
    stand by their own names, beside this layer's.
    """

    def __init__(self, in_features: int, parts: dict[str, int]) -> None:
        super().__init__(in_features, sum(parts.values()))
        self.parts = {name: divide(out, self.ranks, f"output features of {name}") for name, out in parts.items()}

    def whole_shapes(self) -> list[tuple[int, int]]:
        return [(out * self.ranks, self.in_features) for out in self.parts.values()]

    def names(self, prefix: str) -> list[str]:
        """Of the parts' weights in `state_dict`, for a prefix such as "layers.0.attention.wqkv."."""
        parent = prefix.rstrip(".").rpartition(".")[0]
        return [f"{parent}.{name}.weight" if parent else f"{name}.weight" for name in self.parts]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weights = self.dense().split(list(self.parts.values()))
        destination.update(zip(self.names(prefix), weights if keep_vars else [w.detach() for w in weights], strict=True))


def join_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """For the module above joined layers, before `load_state_dict`: their parts, by their own names, become one weight."""
    for child, layer in module.named_children():
        if isinstance(layer, JoinedColumnParallelLinear):
            names = layer.names(f"{prefix}{child}")
            if all(name in state_dict for name in names):
                state_dict[f"{prefix}{child}.weight"] = torch.cat([state_dict.pop(name) for name in names])


class RowParallelLinear(ParallelLinear, fs_layers.RowParallelLinear):
    """This rank's x (..., in / ranks) -> (..., out), summed over the ranks. The weight is split by columns."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, True
        self.ranks = model_parallel()[1]
        self.input_size_per_partition = divide(in_features, self.ranks, "input features of a linear layer")
        self.bias = None
        self.weight = _weight(out_features, self.input_size_per_partition)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(x)
        return y if self.ranks == 1 else reduce_from_model_parallel_region(y)


class ParallelEmbedding(fs_layers.ParallelEmbedding):
    """ids (...) -> (..., dim); each rank holds dim / ranks columns of every id."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.ranks = model_parallel()[1]
        self.embedding_dim_per_partition = divide(embedding_dim, self.ranks, "embedding width")
        self.weight = _weight(num_embeddings, self.embedding_dim_per_partition)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = F.embedding(ids, self.weight)
        return y if self.ranks == 1 else gather_from_model_parallel_region(y)
