"""Keep ranks consistent: compare their input, share results, and raise one rank's failure on all ranks."""

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

SLOW_RANK_SECONDS = 30  # that a rank waits for the other ranks before it prints a warning


def run_on_all_ranks(work: Callable[[], T], must_match: Callable[[T], object] | None = None) -> T:
    """Run `work` on every rank and return its result. If it fails on one rank, raise an error with the cause on all ranks.

    No rank then goes on to a collective that a failed rank never reaches. `work` must not contain a collective.
    must_match: maps the result to a value whose repr must be equal on all ranks; otherwise every rank raises InputError.
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
    mismatched = [str(rank) for rank, (_, digest) in enumerate(gathered) if digest != gathered[0][1]]
    if mismatched:
        raise InputError(
            f"rank(s) {', '.join(mismatched)} were given other input than rank 0, or made another call: make the same calls, "
            "with the same input and the same changes to the model, on every rank; replicas divide the prompts by themselves"
        )
    return result  # type: ignore[return-value]


def run_on_rank0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only. Return its result, or raise its failure, on every rank. `work` may wait for a user's input."""
    if reachable_world_size() == 1:
        return work()
    result, failure = _outcome(work) if global_rank() == 0 else (None, None)
    result_and_error: list[Any] = [result, error_text(failure)]
    with propagate_failure(), defer_signals():
        dist.broadcast_object_list(result_and_error, 0, group=all_ranks_group())
    _raise_first(failure, [result_and_error[1]])
    return result_and_error[0]


def gather_from_replicas(work: Callable[[], T]) -> list[T]:
    """Run `work` on every replica. Return the results of all replicas, in the order of the replicas, on every rank."""
    index, count = replica()
    with propagate_failure():
        if count == 1:
            return [work()]
        result: T | None = None
        failure: LlamaError | None = None
        try:
            result = work()
        except (NonFiniteError, InputError) as e:  # all ranks of this replica raise these errors, but other replicas may not
            failure = e
    gathered: list[Any] = _all_gather((error_text(failure), None if model_parallel()[0] else (index, result)))
    _raise_first(failure, [cause for cause, _ in gathered])
    by_replica = dict(indexed for _, indexed in gathered if indexed)
    return [by_replica[i] for i in range(count)]


def broadcast_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor, in place, from the first rank of the model-parallel group to all its ranks. Return the tensor."""
    if model_parallel()[1] > 1:
        dist.broadcast(tensor, fs.get_model_parallel_src_rank(), group=fs.get_model_parallel_group())
    return tensor


def _all_gather(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks."""
    gathered: list[Any] = [None] * reachable_world_size()
    with propagate_failure(), defer_signals():
        dist.all_gather_object(gathered, value, group=all_ranks_group())
    return gathered


def _outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Return the result of `work` and None, or None and the exception that it raised."""
    try:
        return work(), None
    except BaseException as e:  # catch Ctrl-C too, because the other ranks wait for the outcome of this rank
        return None, e


def _raise_first(local_failure: BaseException | None, causes: list[str | None]) -> None:
    """Raise the failure of this rank, or else an error with the cause of the first rank that failed, if any."""
    if local_failure is not None:
        raise local_failure
    for rank, cause in enumerate(causes):
        if cause is not None:
            error = NonFiniteError if cause.startswith(f"{NonFiniteError.__name__}: ") else LlamaError
            raise error(f"rank {rank} failed, so every rank stops: {cause}")


@contextlib.contextmanager
def _warn_if_slow() -> Iterator[None]:
    """Print one warning if the block waits longer than SLOW_RANK_SECONDS for other ranks, which may never arrive."""
    text = (
        f"llama: rank {global_rank()} has waited {SLOW_RANK_SECONDS} s for the other ranks and keeps waiting: they are slow, "
        "or have made another call (every rank must make the same calls, and end a stream after the same chunk)"
    )
    timer = threading.Timer(SLOW_RANK_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
