"""TODO."""

from dataclasses import dataclass, replace

import torch

FORMATS = ("int8", "int4")
OUTPUT_FORMAT = (
    "int8"  # the output layer's format, in both: 4 bit raises the KL divergence by a third or more, and saves 4% of a step
)
WIDE_ROW = 2048  # inputs from which rows have larger groups: decoding is a tenth faster than with groups of 32


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight, as the table above has it, and the dtype of what it multiplies."""

    format: str
    values: torch.Tensor  # int8 (out, width): whole groups, of which `in_features` inputs count, from `front` on
    scales: torch.Tensor  # (out, groups)
    zeros: torch.Tensor | None  # (out, groups); None: 0
    in_features: int
    dtype: torch.dtype
    front: int = 0

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dequantize(self) -> torch.Tensor:
        """(out, in), as what it stands for."""
        groups = self.values.unflatten(1, (self.scales.shape[1], -1)).float() * self.scales.float().unsqueeze(-1)
        if self.zeros is not None:
            groups += self.zeros.float().unsqueeze(-1)
        return groups.flatten(1)[:, self.front : self.front + self.in_features].to(self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> "QuantizedWeight":
        zero = None if self.zeros is None else self.zeros.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), zeros=zero, dtype=dtype)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def slice_inputs(self, first: int, last: int) -> "QuantizedWeight":
        """The inputs first..last alone: the groups that hold them."""
        if self.scales.shape[1] == 1 and self.zeros is None:  # as on a GPU: the whole row
            return replace(self, values=self.values[:, first:last].contiguous(), in_features=last - first)
        begin, end = first // self.group_size, -(-last // self.group_size)
        q = self.values[:, begin * self.group_size : end * self.group_size].contiguous()
        zero = None if self.zeros is None else self.zeros[:, begin:end]
        front, scale = first - begin * self.group_size, self.scales[:, begin:end]
        return replace(self, values=q, scales=scale, zeros=zero, in_features=last - first, front=front)

    def slice_outputs(self, first: int, last: int) -> "QuantizedWeight":
        """The outputs first..last alone."""
        zero = None if self.zeros is None else self.zeros[first:last]
        return replace(self, values=self.values[first:last], scales=self.scales[first:last], zeros=zero)

    @staticmethod
    def cat(parts: "list[QuantizedWeight]") -> "QuantizedWeight":
        """Their outputs, one after the other."""
        if len(parts) == 1:
            return parts[0]
        zero = None if parts[0].zeros is None else torch.cat([p.zeros for p in parts])  # type: ignore[misc]
        return replace(
            parts[0], values=torch.cat([p.values for p in parts]), scales=torch.cat([p.scales for p in parts]), zeros=zero
        )


def format_of(name: str, format: str) -> str | None:
    """What a weight of Meta's name becomes in a model of this format; None: it stays as it is."""
    if "norm" in name or name == "tok_embeddings.weight":
        return None
    return OUTPUT_FORMAT if name == "output.weight" and format in FORMATS else format


def group_size(in_features: int, format: str) -> int:
    """Inputs that share a scale."""
    group = 128 if format == "int8" else 64
    return group if in_features >= WIDE_ROW and in_features % group == 0 else 32


def bytes_per_weight(format: str | None, dtype: torch.dtype, in_features: int = WIDE_ROW) -> float:
    """With its share of scales and zeros."""
    if format is None:
        return float(dtype.itemsize)
    return {"int8": 1 + 2 / group_size(in_features, format), "int4": 0.5 + 4 / group_size(in_features, format)}[format]
