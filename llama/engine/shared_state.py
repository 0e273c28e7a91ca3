"""The state that all engines of one model share, so that several `Llama` objects may use the same model."""

import threading
import weakref
from dataclasses import dataclass

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
    """The lock of a model, its KV cache (None until allocated), and the call that owns the cache."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cache: KVCache | None = None
        self.owner: CacheOwner | None = None

    def check_owner(self, owner: CacheOwner) -> None:
        """Raise InputError if a call has taken the cache from `owner`."""
        if self.owner is not owner:
            taken_by = self.owner.name if self.owner else "another call"
            raise ended_early(owner.name, f"{taken_by} has been called since, and has overwritten the model's KV cache")


_BY_MODEL: weakref.WeakKeyDictionary[nn.Module, SharedState] = weakref.WeakKeyDictionary()


def shared_state_of(model: nn.Module) -> SharedState:
    """Return the shared state of a model. Create the state when a model is used for the first time."""
    return _BY_MODEL.setdefault(model, SharedState())
