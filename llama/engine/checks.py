"""Small checks that several parts of the engine share."""

import torch
from torch import nn

CACHE_TAKEN_ERROR = "another call has used this model's cache since: end a stream before the next call"


def is_valid_logprob(logprob: float) -> bool:
    """Return False for NaN, and for a value above 0 by more than rounding. -inf, of a masked token, is valid."""
    return logprob <= 0.1  # False for NaN


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU if it has none, as a caller may put in any object with a `forward`."""
    return next((p.device for p in getattr(model, "parameters", list)()), torch.device("cpu"))


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
