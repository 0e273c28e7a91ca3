"""The state that all engines of one model share, so that several `Llama` objects may use the same model."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InputError
from .kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class CacheOwner:
    """Identify the call that owns a KV cache. It holds no reference to the call, which would keep the model alive."""

    name: str  # as in GenerationCall


def ended_early(name: str, why: str) -> InputError:
    """Return the error for a stream or loop that cannot continue. name: the call that began it."""
    return InputError(
        f"this {name} ended before its answer was complete: {why}. What it has returned is right, and the rest is lost; "
        f"call {name} again for a whole answer"
    )


class SharedState:
    """What the threads that use one model share.

    lock: held while the model computes. cache: the KV cache; None until allocated. owner: the call that owns the cache.
    scheduler: returns the scheduler that runs calls, or None. stepping_thread: the thread that runs a step of the scheduler, or
    None; `condition` guards it, and is notified at the end of each step. async_calls, async_thread: the async calls that have
    not ended, and the background thread that runs them, or None; `condition` guards both.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cache: KVCache | None = None
        self.owner: CacheOwner | None = None
        self.scheduler: Callable[[], Any] = lambda: None
        self.condition = threading.Condition()
        self.stepping_thread: int | None = None
        self.async_calls: list[Any] = []
        self.async_thread: threading.Thread | None = None

    def why_not_owner(self, owner: CacheOwner) -> str | None:
        """Return a text that says which call has taken the cache from `owner`; None if none has."""
        if self.owner is owner:
            return None
        taken_by = self.owner.name if self.owner else "another call"
        return f"{taken_by} has been called since, and has overwritten the model's KV cache"


_BY_MODEL: weakref.WeakKeyDictionary[nn.Module, SharedState] = weakref.WeakKeyDictionary()


def shared_state_of(model: nn.Module) -> SharedState:
    """Return the shared state of a model. Create the state when a model is used for the first time."""
    return _BY_MODEL.setdefault(model, SharedState())
