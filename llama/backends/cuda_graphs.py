"""The cuda_graphs backend: capture a decode step as a CUDA graph once, then replay it with one launch.

A captured step has static shapes: a number of rows, a number of tokens per row (1, or with guesses 2, 4 or 8), and a context
length rounded up to a bucket. The inputs and the output of the step keep their addresses. The positions of the tokens are
values on the device, and a mask hides the part of the KV cache after each position. Each bucket is twice as long as the next
smaller one, so that a step reads at most twice the positions it needs. The code that is captured, `CapturedStep.run`, also runs
without capture on any device, for tests.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import tuning
from ..distributed.groups import global_rank
from ..engine.backend import Backend, DecodeFn, DecodeRunsFn, Run
from ..engine.forward import EngineForward
from ..engine.kv_cache import RaggedBatch

ComputeLogits = Callable[[EngineForward, torch.Tensor, RaggedBatch], torch.Tensor]

# Only one capture runs at a time. The start of a capture synchronizes the device, which makes other captures fail.
CAPTURE_LOCK = threading.Lock()


class CudaGraphsBackend(Backend):
    """Capture a decode step once for each number of rows and each context bucket, then replay the captured step."""

    name = "cuda_graphs"
    packs_weights = True

    def __init__(self) -> None:
        self.captures = True  # becomes False when a capture fails; then no more steps are captured
        # Key: (rows, tokens per row, context bucket). Order: least recently used first.
        self.steps: dict[tuple[int, int, int], CapturedStep] = {}
        self.forward: EngineForward | None = None
        self.dependencies: list[object] = []  # the kernels that the steps use, and the addresses of their tensors
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"it is for CUDA, and the device is {device}"

    def begin(self, forward: EngineForward, n_rows: int) -> DecodeFn:
        self._drop_stale_steps(forward)
        return self.decode

    def begin_runs(self, forward: EngineForward) -> DecodeRunsFn:
        self._drop_stale_steps(forward)
        return self.decode_runs

    def n_computed(self, n_rows: int, n_guesses: int, longest: int) -> int:
        return n_rows * run_bucket(1 + longest)

    def _drop_stale_steps(self, forward: EngineForward) -> None:
        """Drop the captured steps if a weight or the KV cache that they read has been replaced."""
        dependencies = forward.graph_dependencies()
        if dependencies != self.dependencies:
            self.steps, self.stream, self.pool, self.dependencies, self.forward = {}, None, None, dependencies, forward

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, positions_host: list[int]) -> torch.Tensor:
        """Run one decode step, and capture it if its shape is new: tokens and positions (B,) -> logits (B, n_words)."""
        return self._run_step(len(tokens), 1, max(positions_host) + 1, tokens, positions)

    def decode_runs(self, runs: Sequence[Run]) -> torch.Tensor:
        """Run one step with several tokens per row, and capture it if its shape is new: N tokens -> logits (N, n_words).

        All rows up to the last one compute the same number of tokens. Shorter runs are filled up with their last token, at the
        positions after it, which are overwritten before they are read. No run ends at the last position of the cache, where
        rows without a run are computed.
        """
        assert self.forward is not None
        last, device = self.forward.cache.data.shape[4] - 1, self.forward.device
        length = run_bucket(max(len(run.tokens) for run in runs))
        n_rows = runs[-1].row + 1
        tokens, positions = [[0] * length for _ in range(n_rows)], [[last] * length for _ in range(n_rows)]
        for run in runs:
            tokens[run.row] = run.tokens + run.tokens[-1:] * (length - len(run.tokens))
            positions[run.row] = [min(run.start + i, last) for i in range(length)]
        wanted = [run.row * length + i for run in runs for i in range(len(run.tokens))]
        inputs = torch.tensor([tokens, positions], device=device).view(2, -1).unbind()
        logits = self._run_step(n_rows, length, max(map(max, positions)) + 1, *inputs)
        return logits[torch.tensor(wanted, device=device)]

    def _run_step(self, n_rows: int, length: int, kv_len: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the captured step for n_rows rows with `length` tokens each: tokens and positions (N,) -> logits (N, n_words)."""
        assert self.forward is not None
        key = n_rows, length, context_bucket(kv_len, self.forward.cache.data.shape[4])
        step = self.steps.pop(key, None)
        if step:
            logits = step(tokens, positions)
        else:
            step, logits = self._new_step(*key, tokens, positions)
        self.steps[key] = step  # the most recently used step is last
        if len(self.steps) > tuning.MAX_CAPTURED_STEPS:
            del self.steps[next(iter(self.steps))]
        return logits

    def _new_step(
        self, n_rows: int, length: int, kv_len: int, tokens: torch.Tensor, positions: torch.Tensor
    ) -> "tuple[CapturedStep, torch.Tensor]":
        """Return a new step and the logits of its first run.

        Capturing launches nothing. So a rank that captures a new step launches the same collectives as a rank that replays it.
        """
        assert self.forward is not None
        step = CapturedStep(self.forward, self.compute_logits, n_rows, kv_len, length)
        logits = self.run_first(step, tokens, positions)
        if self.captures and self.forward.device.type == "cuda":
            with torch.cuda.device(self.forward.device), CAPTURE_LOCK:
                self.capture(step)
        return step, logits

    def compute_logits(self, forward: EngineForward, tokens: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
        """Compute the logits (N, n_words) of tokens (N,). A captured step contains this computation."""
        return forward.logits(forward.hidden_states(tokens, batch))

    def run_first(self, step: "CapturedStep", tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run a step for the first time, before it is captured, and return its logits."""
        return step(tokens, positions)

    def capture(self, step: "CapturedStep") -> None:
        """Capture a step. If that fails, print the reason, and capture no more steps."""
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            step.capture(self.stream, self.pool)
        except RuntimeError as e:  # harmless for other ranks: a step launches the same collectives with or without a capture
            self.captures, self.pool = False, None
            if global_rank() == 0:
                reason = str(e).split("\n")[0]
                print(f"llama: no CUDA graphs, each step is launched kernel by kernel: {reason}", file=sys.stderr)


def context_bucket(kv_len: int, max_seq_len: int) -> int:
    """Return kv_len rounded up to a power of two, at most max_seq_len: the positions that a captured step attends to."""
    return min(max(tuning.MIN_GRAPH_CONTEXT, 1 << (kv_len - 1).bit_length()), max_seq_len)


def run_bucket(length: int) -> int:
    """Return the number of tokens per row rounded up to a power of two."""
    return 1 << (length - 1).bit_length()


class CapturedStep:
    """A decode step of `length` tokens in each of the rows 0 to n_rows - 1, at positions 0 to kv_len - 1 of the KV cache.

    The inputs and the output of the step keep their addresses, as a CUDA graph requires.
    """

    def __init__(
        self, forward: EngineForward, compute_logits: ComputeLogits, n_rows: int, kv_len: int, length: int = 1
    ) -> None:
        self.forward, self.compute_logits = forward, compute_logits
        self.tokens = torch.zeros(n_rows * length, dtype=torch.int64, device=forward.device)
        self.positions = torch.zeros_like(self.tokens)
        self.batch = RaggedBatch.decode(self.positions, kv_len, length)
        self.logits: torch.Tensor | None = None
        self.replay: Callable[[], None] = self.run

    def run(self) -> None:
        """Compute the step's `logits` from its tensors `tokens` and `positions`."""
        self.logits = self.compute_logits(self.forward, self.tokens, self.batch)

    def capture(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Capture `run` as a CUDA graph, which all later calls of the step replay.

        `run` must have been called before, because its first call compiles code and allocates workspaces of CUDA libraries.
        """
        before = torch.cuda.current_stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": operations of other threads, such as allocations for another model, do not make the capture fail.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.run()
        finally:
            torch.cuda.set_stream(before)  # a failed capture does not restore the current stream
        before.wait_stream(stream)
        self.replay = graph.replay

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the step: tokens and positions (N,) -> logits (N, n_words). The next call overwrites the logits."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.replay()
        assert self.logits is not None
        return self.logits
