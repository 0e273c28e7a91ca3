"""Keep ranks consistent: compare what they are asked to do, share results, and raise one rank's failure on all."""

import contextlib
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs

from ..errors import InputError, LlamaError, NonFiniteError
from .failures import defer_signals, error_text, propagate_failure
from .groups import all_ranks_group, global_rank, model_parallel, reachable_world_size, replica

T = TypeVar("T")

SLOW_RANK_SECONDS = 30  # after which a rank that waits for the others prints so


def run_on_all_ranks(work: Callable[[], T], must_match: Callable[[T], object] | None = None) -> T:
    """Run `work` on every rank and return its result; if it fails on one rank, raise the cause on all.

    Every rank then does the same next, and none waits in a collective that another never enters. `work` itself must not contain
    a collective. must_match: maps the result to what must have the same repr on all ranks, or each raises InputError.
    """
    if reachable_world_size() == 1:
        return work()

    def with_fingerprint() -> tuple[T, str]:
        result = work()
        return result, repr(must_match(result)) if must_match else ""

    outcome, failure = _outcome(with_fingerprint)
    result, fingerprint = outcome or (None, "")
    with _warn_if_slow():
        gathered = _all_gather(
            (error_text(failure), hashlib.sha256(fingerprint.encode("utf-8", "backslashreplace")).hexdigest())
        )
    _raise_first(failure, [cause for cause, _ in gathered])
    others = [str(rank) for rank, (_, theirs) in enumerate(gathered) if theirs != gathered[0][1]]
    if others:
        raise InputError(
            f"rank(s) {', '.join(others)} were given other input than rank 0, or made another call: make the same "
            "calls with the same input on every rank, and change the model alike; replicas divide the prompts among themselves"
        )
    return result  # type: ignore[return-value]


def run_on_rank0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone, and return its result, or raise its failure, on every rank. It may wait for a user."""
    if reachable_world_size() == 1:
        return work()
    result, failure = _outcome(work) if global_rank() == 0 else (None, None)
    box: list[Any] = [result, error_text(failure)]
    with propagate_failure(), defer_signals():
        dist.broadcast_object_list(box, 0, group=all_ranks_group())
    _raise_first(failure, [box[1]])
    return box[0]


def gather_from_replicas(work: Callable[[], T]) -> list[T]:
    """Run `work` on every replica, and return the results of all replicas, in their order, on every rank."""
    index, count = replica()
    with propagate_failure():
        if count == 1:
            return [work()]
        result: T | None = None
        failure: LlamaError | None = None
        try:
            result = work()
        except (NonFiniteError, InputError) as e:  # on all ranks of this replica, but perhaps on no other
            failure = e
    gathered: list[Any] = _all_gather((error_text(failure), None if model_parallel()[0] else (index, result)))
    _raise_first(failure, [cause for cause, _ in gathered])
    by_replica = dict(theirs for _, theirs in gathered if theirs)
    return [by_replica[i] for i in range(count)]


def broadcast_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """Copy the tensor of the model-parallel group's first rank to all its ranks, in place."""
    if model_parallel()[1] > 1:
        dist.broadcast(tensor, fs.get_model_parallel_src_rank(), group=fs.get_model_parallel_group())
    return tensor


def _all_gather(mine: T) -> list[T]:
    gathered: list[Any] = [None] * reachable_world_size()
    with propagate_failure(), defer_signals():
        dist.all_gather_object(gathered, mine, group=all_ranks_group())
    return gathered


def _outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except BaseException as e:  # including Ctrl-C: the other ranks wait for this one's outcome
        return None, e


def _raise_first(own: BaseException | None, causes: list[str | None]) -> None:
    """Raise this rank's failure, or else that of the first rank that has one."""
    if own is not None:
        raise own
    for rank, cause in enumerate(causes):
        if cause is not None:
            error = NonFiniteError if cause.startswith(f"{NonFiniteError.__name__}: ") else LlamaError
            raise error(f"rank {rank} failed, so every rank stops: {cause}")


@contextlib.contextmanager
def _warn_if_slow() -> Iterator[None]:
    """Print once if the other ranks take long to arrive, as they may never."""
    text = (
        f"rank {global_rank()} has waited {SLOW_RANK_SECONDS} s for the others and waits on: they are slow, or do "
        "something else (every rank must make the same calls, and end a stream at the same piece)"
    )
    timer = threading.Timer(SLOW_RANK_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
