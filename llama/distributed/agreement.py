"""Keep ranks consistent: compare their inputs, share their results, and raise a failure of one rank on all ranks."""

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
from . import groups
from .failures import defer_signals, error_text, propagate_failure
from .groups import all_ranks_group, global_rank, model_parallel, part_of_calls, reachable_world_size

T = TypeVar("T")

SLOW_RANK_SECONDS = 30  # seconds that a rank waits for other ranks before it prints a warning


def run_on_all_ranks(work: Callable[[], T], must_match: Callable[[T], object] | None = None) -> T:
    """Run `work` on every rank and return its result. If it fails on one rank, raise an error with the cause on all ranks.

    So no rank waits in a later collective for a rank that has failed. `work` itself must not contain a collective.
    must_match: maps the result to a value whose repr must be equal on all ranks; otherwise every rank raises InputError.
    While rank 0 leads, it runs `work` alone.
    """
    if decides_alone():
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
    """Run `work` on rank 0 only. On every rank, return its result or raise its failure. `work` may wait for a user's input.

    A LlamaError is raised as it is on every rank. In place of another failure, the other ranks raise LlamaError with the cause.
    """
    if decides_alone():
        return work()
    result, failure = _outcome(work) if global_rank() == 0 else (None, None)
    # A caller's own class of error may not survive pickling.
    error = failure if isinstance(failure, LlamaError) and type(failure).__module__ == LlamaError.__module__ else None
    shared: list[Any] = [result, error, error_text(failure)]
    with propagate_failure(), defer_signals():
        dist.broadcast_object_list(shared, 0, group=all_ranks_group())
    result, error, cause = shared
    _raise_first(failure or error, [cause])
    return result  # type: ignore[return-value]


def gather_from_replicas(work: Callable[[], T]) -> list[T]:
    """Run `work` on every replica. On every rank, return the results of all replicas, in the order of the replicas."""
    index, count = part_of_calls()
    if groups.rank0_leads:  # a failure of one call must not end the others
        return [work()]
    with propagate_failure():
        if count == 1:
            return [work()]
        result: T | None = None
        failure: LlamaError | None = None
        try:
            result = work()
        except (NonFiniteError, InputError) as e:  # raised by all ranks of this replica, but maybe not by other replicas
            failure = e
    gathered: list[Any] = _all_gather((error_text(failure), None if model_parallel()[0] else (index, result)))
    _raise_first(failure, [cause for cause, _ in gathered])
    by_replica = dict(indexed for _, indexed in gathered if indexed)
    return [by_replica[i] for i in range(count)]


def broadcast_from_rank0(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor in place from the first rank of the model-parallel group to all ranks of the group. Return the tensor."""
    if model_parallel()[1] > 1:
        dist.broadcast(tensor, fs.get_model_parallel_src_rank(), group=fs.get_model_parallel_group())
    return tensor


def is_true_on_all_ranks(flag: bool, device: torch.device) -> bool:
    """Return True if a flag is True on every rank of the model-parallel group."""
    if model_parallel()[1] == 1:
        return flag
    least = torch.tensor([flag], dtype=torch.int32, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=fs.get_model_parallel_group())
    return bool(least)


def decides_alone() -> bool:
    """Return True if this rank need not agree with others: it is the only one, or it leads. Raise InputError if it follows."""
    if reachable_world_size() == 1:
        return True
    if groups.rank0_leads and global_rank():
        raise InputError(f"rank {global_rank()} follows the calls of rank 0 (`lead`), so it can make none: make them on rank 0")
    return groups.rank0_leads


def _all_gather(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks."""
    gathered: list[Any] = [None] * reachable_world_size()
    with propagate_failure(), defer_signals():
        dist.all_gather_object(gathered, value, group=all_ranks_group())
    return gathered


def _outcome(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """Run `work`. Return its result and None if it succeeds, or None and the exception if it raises."""
    try:
        return work(), None
    except BaseException as e:  # catch Ctrl-C too, because the other ranks wait for the outcome of this rank
        return None, e


def _raise_first(local_failure: BaseException | None, causes: list[str | None]) -> None:
    """Raise the failure of this rank. If this rank has not failed, raise an error with the cause of the first failed rank.

    If no rank has failed, return.
    """
    if local_failure is not None:
        raise local_failure
    for rank, cause in enumerate(causes):
        if cause is not None:
            error = NonFiniteError if cause.startswith(f"{NonFiniteError.__name__}: ") else LlamaError
            raise error(f"rank {rank} failed, so every rank stops: {cause}")


@contextlib.contextmanager
def _warn_if_slow() -> Iterator[None]:
    """Print one warning if the block inside this context waits longer than SLOW_RANK_SECONDS for other ranks."""
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
