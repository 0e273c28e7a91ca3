"""One decode step: an id for each row in, logits for the next ones out.

On the CPU steps go through the layers without modules (host.py). On CUDA a step is captured once as a graph and then replayed:
the same kernels on the same memory, with one launch. So a captured step has static shapes, rows by a bucket of cache slots, and
keeps its inputs and its output where they are; positions are numbers on the device, and a mask hides the slots beyond them.
Buckets double, so that a step reads at most twice the slots it needs. `Step.run` is what is captured; it runs on any device,
which is how the tests see it.
"""

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .cache import Batch
from .compiled import any_number_of_shapes
from .errors import DeviceError
from .host import host_step, matches_params
from .model import Transformer, untouched
from .parallel import ParallelLinear
from .ranks import global_rank

SMALLEST_BUCKET = 128
HIDDEN, LOGITS = Transformer.hidden, Transformer.logits
CAPTURING = threading.Lock()  # one at a time: beginning a capture waits for the device, which another one forbids
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
        self.batch = Batch.step(self.positions, end)
        self.logits: torch.Tensor | None = None
        self.replay: Callable[[], None] = self.run

    def run(self) -> None:
        model = self.model
        hidden = model.hidden(self.ids, self.batch, compiled=True)
        self.logits = model.compiled.logits(model, hidden) if model.compiled else model.logits(hidden)

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

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits stay right until the next call."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.replay()
        assert self.logits is not None
        return self.logits


def unwatched(model: Transformer) -> bool:
    """Whether a step may pass modules by: those of the layers, as the CPU's do; on a GPU all, as a captured step calls no
    Python. It may where none has a hook, is a caller's, or has a function of a caller's."""
    parts: list[torch.nn.Module] = list(model.layers)
    if model.device.type != "cpu":
        parts += [model.tok_embeddings, model.norm, model.output]
    own = [getattr(method, "__func__", None) for method in (model.hidden, model.logits)]
    return own == [HIDDEN, LOGITS] and untouched(m for part in parts for m in part.modules())


def addresses(model: Transformer) -> list[object]:
    """Where all lies that a captured step looks at, but for the cache, and the numbers in it: what is loaded later may lie
    elsewhere. Nothing is kept alive by it."""
    found: list[object] = [model.compiled, model.angles(slice(1)).data_ptr()]
    for module in model.modules():
        weight, packed = getattr(module, "weight", None), getattr(module, "packed", None)
        found.append(weight.data_ptr() if isinstance(weight, torch.Tensor) else packed and weakref.ref(packed))
        found.append(getattr(module, "eps", None))
    return found


# ids and positions (B,) of rows 0..B -> float32 logits (B, vocab), which stay right until the next one. The list has the
# positions as the host knows them; rows that nobody needs any more have 0 there, and anything in the tensor.
Take = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


class Decoder:
    """The decode steps of a model, static ones where they are to be captured."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.static: bool | None = None  # None: on CUDA
        self.captures = True
        self.steps: dict[tuple[int, int], Step] = {}
        self.memory: list[object] = []  # what the steps look at
        self.marks: tuple[object, ...] = ()  # of a change in it
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    def begin(self, n_rows: int) -> Take:
        """How all steps of a call go, by what the model is when it begins."""
        model, plain = self.model, unwatched(self.model)
        if plain and (model.device.type == "cuda" if self.static is None else self.static):
            self._look()
            return self.captured
        served = plain and model.device.type == "cpu" and model.dtype != torch.float64 and matches_params(model)
        return functools.partial(self.launched, host_step(model, n_rows) if served else model.hidden)

    def launched(
        self, hidden: Callable[[torch.Tensor, Batch], torch.Tensor], ids: torch.Tensor, positions: torch.Tensor, at: list[int]
    ) -> torch.Tensor:
        """Kernel by kernel."""
        device = self.model.device
        if device.type == "cpu" or len(set(at)) == 1:  # on the CPU each row sees its own slots only: as alone
            batch = Batch.of(((row, position, 1) for row, position in enumerate(at)), device)
        else:
            batch = Batch.step(positions, max(at) + 1)
        return self.model.logits(hidden(ids, batch))

    def captured(self, ids: torch.Tensor, positions: torch.Tensor, at: list[int]) -> torch.Tensor:
        """By static steps."""
        if self._marks() != self.marks:
            self._look()
        key = len(ids), bucket(max(at) + 1, self.model.params.max_seq_len)
        step = self.steps.pop(key, None)
        if step:
            logits = step(ids, positions)
        else:
            step, logits = self._make(*key, ids, positions)
        self.steps[key] = step  # the last used is the last
        if len(self.steps) > MOST_STEPS:
            del self.steps[next(iter(self.steps))]
        return logits

    def _marks(self) -> tuple[object, ...]:
        model = self.model
        return model.ready_cache(), model.norm.weight.data_ptr(), ParallelLinear.times_held

    def _look(self) -> None:
        """Forget the steps if what they look at is no longer what there is."""
        self.marks, memory = self._marks(), [self.model.ready_cache(), *addresses(self.model)]
        if memory != self.memory:
            self.steps, self.stream, self.pool, self.memory = {}, None, None, memory

    def _make(self, n_rows: int, end: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[Step, torch.Tensor]:
        """A step, and what it gives when it runs for the first time. That is its turn, and capturing runs nothing: ranks launch
        the same collectives whether they have the step already or make it."""
        step = Step(self.model, n_rows, end)
        try:
            with any_number_of_shapes() if self.model.compiled else contextlib.nullcontext():
                logits = step(ids, positions)
        except Exception as e:
            if self.model.compiled is None:
                raise
            raise DeviceError(f"torch.compile failed; leave compile=True out ({' '.join(str(e).split()):.200})") from e
        if self.captures and self.model.device.type == "cuda":
            with torch.cuda.device(self.model.device), CAPTURING:
                self._capture(step)
        return step, logits

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
