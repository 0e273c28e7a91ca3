"""TODO."""

import functools
from collections.abc import Callable

import torch

from ..engine.backend import Backend, DecodeFn
from ..engine.forward import EngineForward
from ..engine.kv_cache import RaggedBatch


class TorchBackend(Backend):
    name = "torch"
    packs_weights = True

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        return functools.partial(decode_layerwise, forward, forward.hidden_states)


def decode_layerwise(
    forward: EngineForward,
    hidden: Callable[[torch.Tensor, RaggedBatch], torch.Tensor],
    tokens: torch.Tensor,
    positions: torch.Tensor,
    at: list[int],
) -> torch.Tensor:
    """Take a step kernel by kernel."""
    if forward.device.type == "cpu" or len(set(at)) == 1:  # on the CPU each row sees its own positions only: as alone
        batch = RaggedBatch.from_segments(((row, position, 1) for row, position in enumerate(at)), forward.device)
    else:
        batch = RaggedBatch.decode(positions, max(at) + 1)
    return forward.logits(hidden(tokens, batch))
