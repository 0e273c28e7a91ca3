"""The state that all engines of one model share, so that several `Llama` objects may use the same model."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InputError
from .kv_cache import KVCache
from .prompt_lookup import FIRST_CHANCE
from .step_costs import LossLimit, StepCosts
from .step_turn import StepTurn


@dataclass(frozen=True, eq=False)
class CacheOwner:
    """Identify what owns a KV cache: a scheduler, a reference loop or a call of `score`. Holds no reference to it."""

    name: str  # the call that began it, as in GenerationCall


def ended_early(name: str, why: str) -> InputError:
    """Return the error for a call or stream that cannot continue. name: the public method that began it."""
    return InputError(
        f"this {name} ended before its answer was complete: {why}. Tokens that it has yielded are right; call {name} again "
        "for a whole answer"
    )


class SharedState:
    """What the threads that use one model share.

    lock: held while the model computes. cache: the KV cache; None until allocated. owner: what owns the cache.
    scheduler: a function that returns the scheduler that runs calls, or None. turn: which thread runs its steps. leader: what
    leads the other ranks on rank 0 (`leading.Leader`), or None. step_costs: the times of decode steps so far, of calls that
    speculate. loss_limit: what their guesses may cost. draft: the draft model, a `Llama`, or None. targets: the models for
    which this one is the draft. draft_chance: how often its guesses have been right.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cache: KVCache | None = None
        self.owner: CacheOwner | None = None
        self.scheduler: Callable[[], Any] = lambda: None
        self.turn = StepTurn()
        self.leader: Any = None
        self.step_costs, self.loss_limit = StepCosts(), LossLimit()
        self.draft: Any = None
        self.targets: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.draft_chance = FIRST_CHANCE

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
