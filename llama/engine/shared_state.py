"""The state that all engines of one model share, so that several `Llama` objects may use the same model."""

import threading
import weakref

from torch import nn

from .kv_cache import KVCache

CACHE_TAKEN_ERROR = "another call has used this model's cache since: end a stream, or a loop over tokens, before the next call"


class SharedState:
    """The lock of a model, its KV cache (None until allocated), and the call that owns the cache."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cache: KVCache | None = None
        self.owner: object = None  # identifies that call without keeping it, and so the model, alive; None if there is none


_BY_MODEL: weakref.WeakKeyDictionary[nn.Module, SharedState] = weakref.WeakKeyDictionary()


def shared_state_of(model: nn.Module) -> SharedState:
    """Return the shared state of a model. Create the state when a model is used for the first time."""
    return _BY_MODEL.setdefault(model, SharedState())
