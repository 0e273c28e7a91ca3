"""The torch backend: run decode steps layer by layer, on any device, with kernels launched one by one."""

import functools
from collections.abc import Callable, Sequence

import torch

from ..engine.backend import Backend, DecodeFn, DecodeRunsFn, Run
from ..engine.forward import EngineForward
from ..engine.kv_cache import RaggedBatch


class TorchBackend(Backend):
    """Run decode steps with the engine's forward, layer by layer."""

    name = "torch"
    packs_weights = True

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        return functools.partial(decode_layerwise, forward, forward.hidden_states)

    def begin_runs(self, forward: EngineForward) -> DecodeRunsFn:
        return functools.partial(decode_runs_layerwise, forward, lambda n: forward.hidden_states)


def decode_layerwise(
    forward: EngineForward,
    hidden_states: Callable[[torch.Tensor, RaggedBatch], torch.Tensor],
    tokens: torch.Tensor,
    positions: torch.Tensor,
    positions_host: list[int],
) -> torch.Tensor:
    """Run one decode step: tokens and positions (B,) -> logits (B, n_words).

    hidden_states: the function that computes all layers of the step.
    """
    # On the CPU, a row attends only to its own positions, without padding, so that other rows do not change its result.
    if forward.device.type == "cpu" or len(set(positions_host)) == 1:
        pieces = ((row, position, 1) for row, position in enumerate(positions_host))
        batch = RaggedBatch.from_segments(pieces, forward.device, decoding=True)
    else:
        batch = RaggedBatch.decode(positions, max(positions_host) + 1)
    return forward.logits(hidden_states(tokens, batch))


def decode_runs_layerwise(
    forward: EngineForward,
    hidden_states: Callable[[int], Callable[[torch.Tensor, RaggedBatch], torch.Tensor]],
    runs: Sequence[Run],
) -> torch.Tensor:
    """Decode a run of tokens per row: N tokens in total -> logits (N, n_words).

    hidden_states: a function (N) -> the function that computes all layers of a step with N tokens.
    Each token is a sequence of length 1 for attention, so that it is rounded as in a decode step of its own.
    """
    tokens = torch.tensor([token for run in runs for token in run.tokens], device=forward.device)
    pieces = ((run.row, run.start + i, 1) for run in runs for i in range(len(run.tokens)))
    batch = RaggedBatch.from_segments(pieces, forward.device, decoding=True)
    return forward.logits(hidden_states(len(tokens))(tokens, batch))
