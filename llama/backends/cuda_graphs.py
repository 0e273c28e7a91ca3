"""TODO."""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import compat, tuning
from ..distributed.groups import global_rank
from ..engine.backend import Backend, DecodeFn
from ..engine.forward import EngineForward, EngineLayer
from ..engine.kv_cache import RaggedBatch
from ..errors import DeviceError

if TYPE_CHECKING:
    from .torch_compile import CompiledLayer

CAPTURE_LOCK = threading.Lock()  # one capture at a time: beginning one synchronizes the device, an error during another


class CudaGraphsBackend(Backend):
    name = "cuda_graphs"
    packs_weights = True

    def __init__(self) -> None:
        self.captures = True
        self.layer: CompiledLayer | None = None
        self.steps: dict[tuple[int, int], CapturedStep] = {}
        self.forward: EngineForward | None = None
        self.memory: list[object] = []  # what the steps look at
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"it is for CUDA, and the device is {device}"

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        self._look(forward)
        return self.take

    def _look(self, forward: EngineForward) -> None:
        """Drop the captured steps if a weight or the cache that they read has been replaced."""
        memory = [self.layer, *forward.graph_dependencies()]
        if memory != self.memory:
            self.steps, self.stream, self.pool, self.memory, self.forward = {}, None, None, memory, forward

    def take(self, tokens: torch.Tensor, positions: torch.Tensor, at: list[int]) -> torch.Tensor:
        assert self.forward is not None
        key = len(tokens), context_bucket(max(at) + 1, self.forward.cache.data.shape[4])
        step = self.steps.pop(key, None)
        if step:
            logits = step(tokens, positions)
        else:
            step, logits = self._make(*key, tokens, positions)
        self.steps[key] = step  # the last used is the last
        if len(self.steps) > tuning.MAX_CAPTURED_STEPS:
            del self.steps[next(iter(self.steps))]
        return logits

    def _make(
        self, n_rows: int, end: int, tokens: torch.Tensor, positions: torch.Tensor
    ) -> "tuple[CapturedStep, torch.Tensor]":
        """Return a new step and the logits of its first run. Capturing runs nothing, so that ranks launch the same collectives
        whether they have the step or make it."""
        assert self.forward is not None
        step = CapturedStep(self.forward, self.layer, n_rows, end)
        try:
            with compat.unlimited_recompiles() if self.layer else contextlib.nullcontext():
                logits = step(tokens, positions)
        except Exception as e:
            if self.layer is None:
                raise
            raise DeviceError(
                f"torch.compile failed; leave compile=True out, or use backend='cuda_graphs' ({' '.join(str(e).split()):.200})"
            ) from e
        if self.captures and self.forward.device.type == "cuda":
            with torch.cuda.device(self.forward.device), CAPTURE_LOCK:
                self._capture(step)
        return step, logits

    def _capture(self, step: "CapturedStep") -> None:
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            step.capture(self.stream, self.pool)
        except RuntimeError as e:  # ranks need not agree on it: captured or not, they launch the same collectives
            self.captures, self.pool = False, None
            if global_rank() == 0:
                reason = str(e).split("\n")[0]
                print(f"no CUDA graphs, each step is launched kernel by kernel: {reason}", file=sys.stderr)


def context_bucket(end: int, positions: int) -> int:
    """Return how many positions a captured step looks at, to see 0..end."""
    return min(max(tuning.MIN_GRAPH_CONTEXT, 1 << (end - 1).bit_length()), positions)


class CapturedStep:
    """A decode step of rows 0..n_rows over the cache's positions 0..end, in static memory."""

    def __init__(self, forward: EngineForward, layer: "CompiledLayer | None", n_rows: int, end: int) -> None:
        self.forward, self.layer = forward, layer
        self.tokens = torch.zeros(n_rows, dtype=torch.int64, device=forward.device)
        self.positions = torch.zeros_like(self.tokens)
        self.batch = RaggedBatch.decode(self.positions, end)
        self.logits: torch.Tensor | None = None
        self.replay: Callable[[], None] = self.run

    def run(self) -> None:
        hidden = self.forward.hidden_states(self.tokens, self.batch, layer_fn=self.layer or EngineLayer.forward)
        self.logits = self.layer.logits(self.forward, hidden) if self.layer else self.forward.logits(hidden)

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Make `replay` a CUDA graph of `run`, which has run before: libraries have their workspaces, code is compiled."""
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": what other threads do meanwhile, another model's allocations say, is none of its business.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.run()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails does not
        before.wait_stream(stream)
        self.replay = graph.replay

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits stay right until the next call."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.replay()
        assert self.logits is not None
        return self.logits
