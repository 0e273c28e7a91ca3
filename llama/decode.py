"""One decode step: an id for each row in, logits for the next ones out.

On CUDA a step is captured once as a graph and then replayed: the same kernels on the same memory, with one launch. So a
captured step has static shapes, rows by a bucket of cache slots, and keeps its inputs and its output where they are;
positions are numbers on the device, and a mask hides the slots beyond them. Buckets double, so that a short context does
not read the whole cache. `Step.run` is what is captured; it runs on any device, which is how the tests see it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from .cache import Batch, KVCache
from .model import Transformer
from .runtime import global_rank

SMALLEST_BUCKET = 128


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

    def capture(self, pool: Any) -> None:
        """Make `replay` a CUDA graph of `run`. What it computes on the way is what the first replay computes again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces, the compiler compiles
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.run()
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
        self.static = self.captures = model.device.type == "cuda"
        self.steps: dict[tuple[int, int], Step] = {}
        self.cache: KVCache | None = None  # whose memory the steps look at
        self.pool: Any = None

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, end: int, ragged: bool) -> torch.Tensor:
        """ids and positions (B,) of rows 0..B, all below `end` -> float32 logits (B, vocab), until the next call.

        ragged=False: all positions are end - 1.
        """
        model, n_rows = self.model, len(ids)
        if not self.static:
            rows = torch.arange(n_rows, device=ids.device)
            return model.logits(model.hidden(ids, Batch.step(rows, positions, end, ragged)))
        if self.cache is not model.cache:
            self.steps, self.cache = {}, model.cache
        key = n_rows, bucket(end, model.params.max_seq_len)
        if key not in self.steps:
            self.steps[key] = self._make(*key, ids, positions)
        return self.steps[key](ids, positions)

    def _make(self, n_rows: int, end: int, ids: torch.Tensor, positions: torch.Tensor) -> Step:
        step = Step(self.model, n_rows, end)
        if self.captures:
            step.ids.copy_(ids)  # the warm-up writes keys and values: the right ones
            step.positions.copy_(positions)
            try:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                step.capture(self.pool)
            except RuntimeError as e:
                self.captures = False
                if global_rank() == 0:
                    reason = str(e).split("\n")[0]
                    print(f"no CUDA graphs, each step is launched kernel by kernel: {reason}", file=sys.stderr)
        return step
