"""One decode step: an id for each row in, logits for the next ones out.

On CUDA a step is captured once as a graph and then replayed: the same kernels on the same memory, with one launch. So a
captured step has static shapes, rows by a bucket of cache slots, and keeps its inputs and its output where they are;
positions are numbers on the device, and a mask hides the slots beyond them. Buckets double, so that a step reads at most
twice the slots it needs. `Step.run` is what is captured; it runs on any device, which is how the tests see it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from .cache import Batch, KVCache
from .errors import DeviceError
from .model import Transformer
from .ranks import global_rank

SMALLEST_BUCKET = 128
MOST_STEPS = 64  # kept at a time: each has its own memory for what it computes


def bucket(end: int, window: int) -> int:
    """How many slots a captured step looks at, to see 0..end."""
    return min(max(SMALLEST_BUCKET, 1 << (end - 1).bit_length()), window)


class Step:
    """A decode step of rows 0..n_rows over the cache's slots 0..end, in static memory."""

    def __init__(self, model: Transformer, n_rows: int, end: int) -> None:
        self.model = model
        self.ids = torch.zeros(n_rows, dtype=torch.int64, device=model.device)
        self.positions = torch.zeros_like(self.ids)
        self.batch = Batch.step(torch.arange(n_rows, device=model.device), self.positions, end)
        self.logits: torch.Tensor | None = None
        self.replay: Callable[[], None] = self.run

    def run(self) -> None:
        self.logits = self.model.logits(self.model.hidden(self.ids, self.batch, compiled=True))

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Make `replay` a CUDA graph of `run`, which has run before: libraries have their workspaces, code is compiled."""
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self.run()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails does not
        before.wait_stream(stream)
        self.replay = graph.replay

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits stay right until the next call."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.replay()
        assert self.logits is not None
        return self.logits


class Decoder:
    """The decode steps of a model, static ones where they are to be captured."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.static: bool | None = None  # None: on CUDA
        self.captures = True
        self.steps: dict[tuple[int, int], Step] = {}
        self.memory: tuple[KVCache | None, int] | None = None  # what the steps look at
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, end: int, ragged: bool) -> torch.Tensor:
        """ids and positions (B,) of rows 0..B, all below `end` -> float32 logits (B, vocab), until the next call.

        ragged=False: all positions are end - 1.
        """
        model, n_rows = self.model, len(ids)
        if not (model.device.type == "cuda" if self.static is None else self.static):
            rows = torch.arange(n_rows, device=ids.device)
            return model.logits(model.hidden(ids, Batch.step(rows, positions, end, ragged)))
        memory = model.ready_cache(), model.norm.weight.data_ptr()
        if memory != self.memory:
            self.steps, self.stream, self.pool, self.memory = {}, None, None, memory
        key = n_rows, bucket(end, model.params.max_seq_len)
        step = self.steps.pop(key, None) or self._make(*key, ids, positions)
        self.steps[key] = step  # the last used is the last
        if len(self.steps) > MOST_STEPS:
            del self.steps[next(iter(self.steps))]
        return step(ids, positions)

    def _make(self, n_rows: int, end: int, ids: torch.Tensor, positions: torch.Tensor) -> Step:
        step = Step(self.model, n_rows, end)
        step.ids.copy_(ids)  # the first run writes keys and values: the right ones
        step.positions.copy_(positions)
        try:
            with self.model.compiling():
                step.run()
        except Exception as e:
            if self.model.compiled is None:
                raise
            raise DeviceError(f"torch.compile failed; leave compile=True out ({' '.join(str(e).split()):.200})") from e
        if self.captures and self.model.device.type == "cuda":
            with torch.cuda.device(self.model.device):
                self._capture(step)
        return step

    def _capture(self, step: Step) -> None:
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            step.capture(self.stream, self.pool)
        except RuntimeError as e:  # ranks need not agree on it: captured or not, they launch the same collectives
            self.captures, self.pool = False, None
            if global_rank() == 0:
                reason = str(e).split("\n")[0]
                print(f"no CUDA graphs, each step is launched kernel by kernel: {reason}", file=sys.stderr)
