"""The int8 and int4 formats: which weights are quantized, their group sizes, and the tensors of a quantized weight.

A quantized weight (out, in) is stored as small integers. Each group of adjacent inputs of one output shares a scale and, in
int4, a zero, which is the weight that the integer 0 represents:

    weight[o, i] = values[o, i] * scales[o, i // group_size] + zeros[o, i // group_size]

    int8    values from -127 to 127, no zeros
    int4    values from -8 to 7

A group has 128 inputs in int8 and 64 inputs in int4. A group has only 32 inputs if the row has fewer than 2,048 inputs, or
if 128 (in int4, 64) does not divide the number of inputs. On a GPU, an int8 row of 2,048 inputs or more is a single group.
Scales and zeros are bfloat16.
"""

from dataclasses import dataclass, replace

import torch

from ..errors import InputError, describe

FORMATS = ("int8", "int4")
# The output layer is int8 in int4 models too: int4 would save 4% of the time of a decode step, but raise the KL divergence from
# the unquantized model by a third or more.
OUTPUT_FORMAT = "int8"
# Rows with at least this many inputs have groups of more than 32 inputs, which makes decoding a tenth faster.
WIDE_ROW = 2048


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight (out, in): integer values, scales and zeros in the format that quantization/weight.py describes."""

    format: str  # "int8" or "int4"
    values: torch.Tensor  # int8, shape (out, width); width is a multiple of the group size
    scales: torch.Tensor  # shape (out, groups)
    zeros: torch.Tensor | None  # shape (out, groups); None in int8
    in_features: int  # inputs of the weight; `values` may have more columns, to complete the first and last group
    dtype: torch.dtype  # dtype of the activations that the weight multiplies
    padding_before: int = 0  # padding columns of `values` before the first input of the weight

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def group_size(self) -> int:
        """Return the number of inputs that share a scale."""
        return self.values.shape[1] // self.scales.shape[1]

    def dequantize(self) -> torch.Tensor:
        """Return the weight as a plain tensor (out, in)."""
        groups = self.values.unflatten(1, (self.scales.shape[1], -1)).float() * self.scales.float().unsqueeze(-1)
        if self.zeros is not None:
            groups += self.zeros.float().unsqueeze(-1)
        return groups.flatten(1)[:, self.padding_before : self.padding_before + self.in_features].to(self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> "QuantizedWeight":
        """Return the weight on `device`, for activations of `dtype`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), zeros=zeros, dtype=dtype)

    def slice_inputs(self, first: int, last: int) -> "QuantizedWeight":
        """Return inputs `first` to `last` - 1 of the weight, extended to whole groups; the added inputs count as padding."""
        if self.scales.shape[1] == 1 and self.zeros is None:  # one scale for the whole row, so no padding is needed
            return replace(self, values=self.values[:, first:last].contiguous(), in_features=last - first)
        size = self.group_size
        first_group, last_group = first // size, -(-last // size)
        return replace(
            self,
            values=self.values[:, first_group * size : last_group * size].contiguous(),
            scales=self.scales[:, first_group:last_group],
            zeros=None if self.zeros is None else self.zeros[:, first_group:last_group],
            in_features=last - first,
            padding_before=first - first_group * size,
        )

    def slice_outputs(self, first: int, last: int) -> "QuantizedWeight":
        """Return outputs `first` to `last` - 1 of the weight."""
        zeros = None if self.zeros is None else self.zeros[first:last]
        return replace(self, values=self.values[first:last], scales=self.scales[first:last], zeros=zeros)

    @staticmethod
    def cat(parts: "list[QuantizedWeight]") -> "QuantizedWeight":
        """Concatenate the outputs of several weights that have the same inputs."""
        if len(parts) == 1:
            return parts[0]
        values, scales = torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
        zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts])  # type: ignore[misc]
        return replace(parts[0], values=values, scales=scales, zeros=zeros)


def check_quantize(quantize: str | None) -> None:
    """Raise InputError unless `quantize` is "int8", "int4" or, for no quantization, None."""
    if quantize is not None and (not isinstance(quantize, str) or quantize not in FORMATS):
        raise InputError(f"quantize is {describe(quantize)}; use {' or '.join(map(repr, FORMATS))}, or leave it out")


def format_of(name: str, format: str) -> str | None:
    """Return the format of one weight in a model whose format is `format`, or None if the weight is never quantized.

    name: the name of the weight in Meta's checkpoints, such as "output.weight".
    """
    if "norm" in name or name == "tok_embeddings.weight":
        return None
    return OUTPUT_FORMAT if name == "output.weight" and format in FORMATS else format


def group_size(in_features: int, format: str) -> int:
    """Return the number of adjacent inputs that share a scale, in rows of `in_features` inputs."""
    group = 128 if format == "int8" else 64
    return group if in_features >= WIDE_ROW and in_features % group == 0 else 32


def bytes_per_weight(format: str | None, dtype: torch.dtype, in_features: int = WIDE_ROW) -> float:
    """Return the average bytes per value, including scales and zeros; if `format` is None, the bytes of a value in `dtype`."""
    if format is None:
        return float(dtype.itemsize)
    return {"int8": 1 + 2 / group_size(in_features, format), "int4": 0.5 + 4 / group_size(in_features, format)}[format]
