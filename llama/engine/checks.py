"""Check log probabilities and logits of a model, and provide small helpers for several parts of the engine."""

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import NonFiniteError
from .requests import Request


def check_logprobs(model: nn.Module, logprobs: Iterable[float | None], label: str) -> None:
    """Raise NonFiniteError if a log probability of a prompt's tokens is invalid. label: name of the prompt in the error."""
    if not all(logprob is not None and is_valid_logprob(logprob) for logprob in logprobs):
        raise _nonfinite_error(model, label, "a token's log probability is")


def is_valid_logprob(logprob: float) -> bool:
    """Return True for a value that is at most 0, except for rounding. -inf, for a masked token, is valid; NaN is not."""
    return logprob <= 0.1  # any comparison with NaN is False


def nonfinite_logits_error(model: nn.Module, request: Request, num_generated: int, position: int) -> NonFiniteError:
    """Return the error for a request whose logits at a position are not finite, after num_generated new tokens."""
    what = f"the logits of new token {num_generated + 1}, at position {position}, are"
    return _nonfinite_error(model, request.label, what)


def nonfinite_states_error(model: nn.Module, label: str, layer: int) -> NonFiniteError:
    """Return the error for a text whose hidden states are not finite. layer: number of the state, as in `hidden_states`."""
    return _nonfinite_error(model, label, f"hidden states of layer {layer} are")


def _nonfinite_error(model: nn.Module, label: str, what: str) -> NonFiniteError:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    wider = {"float16": "'bfloat16' or 'float32'", "bfloat16": "'float32'"}.get(dtype)
    or_dtype = f", or build with dtype={wider}: {dtype} may not hold what they compute" if wider else ""
    return NonFiniteError(f"{label}: {what} not finite; the weights are damaged: compare with checklist.chk{or_dtype}")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters, or the CPU for an object without parameters.

    A caller may replace the model by any object that has a `forward`.
    """
    return next((p.device for p in getattr(model, "parameters", list)()), torch.device("cpu"))


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    low, high = 0, min(len(a), len(b))  # a[:low] and b[:low] are equal
    while low < high:  # bisect, since slices are compared far faster than items one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
