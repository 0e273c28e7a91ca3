"""A draft model: a small model that guesses the next tokens of a large one with the same vocabulary."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import tuning
from ..distributed import groups
from ..distributed.agreement import broadcast_from_rank0, is_true_on_all_ranks
from ..distributed.groups import model_parallel
from ..errors import InputError, describe
from ..sampling import sample, seeded_exponential
from ..tokenizer import Tokenizer
from .backend import Run
from .call_options import CallOptions
from .checks import common_prefix_length
from .kv_cache import RaggedBatch
from .prompt_lookup import Chance
from .requests import Request
from .shared_state import CacheOwner

if TYPE_CHECKING:
    from .engine import Engine

T = TypeVar("T")

NO_DRAFT = "speculate='draft', but the model has no draft; give build(draft=...) a smaller model, as a Llama"
NO_EAGER = "speculate= and draft= need another backend than 'eager'; leave backend out"

# After this number of steps without a guess, one more is tried: the text may have become easier. Each time, the number doubles.
TRY_AGAIN = 64
MAX_RUN = 8  # more tokens than this are prefilled
PREFILL_SPEED = 8  # how many tokens are taken to be prefilled in the time of a step
PREFILL_SHARE = 64  # number of answer tokens that are taken to gain by the prefill of a prompt


@dataclass
class DraftRow:
    """A row of the draft's cache, which has the same index as the row of the large model's cache.

    tokens: those of the prompt and of the answer so far. fed: those whose keys and values are in the row, guesses included.
    guesses: those of the last step that have not been compared yet with what was sampled. chance: how likely guesses are right.
    """

    request: Request
    tokens: list[int]
    chance: Chance
    fed: list[int] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    n_idle: int = 0  # steps since the last guess
    try_again: int = TRY_AGAIN


class DraftGuesser:
    """Guess with a draft model, in its own KV cache. While the draft answers calls of its own, it does not guess."""

    def __init__(self, draft: "Engine") -> None:
        self.draft, self.costs = draft, draft.shared.step_costs
        self.owner = CacheOwner("a call for which this model drafts")
        self.rows: dict[int, DraftRow] = {}
        self.forward = draft.forward()
        self.decode_runs = draft.backend.begin_runs(self.forward)

    def admit(self, row: int, request: Request) -> None:
        self.rows[row] = DraftRow(request, [*request.prompt], Chance(self.draft.shared.draft_chance))

    def release(self, row: int) -> None:
        del self.rows[row]

    def append(self, row: int, token: int) -> None:
        each = self.rows[row]
        if each.guesses:
            is_right = each.guesses.pop(0) == token
            each.chance.record(is_right)
            each.guesses = each.guesses if is_right else []
            self.draft.shared.draft_chance = each.chance.value
        each.tokens.append(token)

    def is_ready(self) -> bool:
        status = self._locked(self._cache_status) or 0
        is_free = is_true_on_all_ranks(status > 0, self.forward.device)
        is_untouched = is_true_on_all_ranks(status > 1, self.forward.device)
        if is_free and not is_untouched:
            self._locked(self._take_cache)
        return is_free

    def expected(self, row: int, limit: int) -> list[float]:
        each = self.rows[row]
        each.n_idle += 1
        if each.n_idle > each.try_again:
            return [1.0] * min(limit, 1)
        return [each.chance.value**n for n in range(1, limit + 1)]

    def seconds(self, n: int) -> float:
        return n * self.costs.seconds(self._n_computed(len(self.rows)))

    def first_seconds(self, row: int) -> float:
        each = self.rows[row]
        n_new = len(each.tokens) - common_prefix_length(each.fed, each.tokens) - 1
        n_left = each.request.max_new_tokens - (len(each.tokens) - len(each.request.prompt))
        return n_new * self.seconds(1) / PREFILL_SPEED / max(1, min(n_left, PREFILL_SHARE))

    def _n_computed(self, n_rows: int) -> int:
        return self.draft.backend.n_computed(n_rows, 0, 0)

    def guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        guesses = self._locked(lambda: self._guess(counts)) or {}
        for row, guessed in guesses.items():
            each = self.rows[row]
            each.try_again *= 2 if each.n_idle > each.try_again else 1
            each.guesses, each.n_idle = [*guessed], 0
        return guesses

    def _locked(self, work: Callable[[], T]) -> T | None:
        """Do something with the draft. Return None if another thread is using it, which may be waiting for this one.

        On several ranks, wait: there, only calls of all ranks use the draft, and all ranks must do the same.
        """
        if not self.draft.lock.acquire(blocking=model_parallel()[1] > 1):
            return None
        try:
            self.forward.cache.sync_streams()
            with self.draft.without_autocast():
                return work()
        finally:
            self.draft.lock.release()

    def _guess(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        guesses: dict[int, list[int]] = {row: [] for row in counts}
        self._prefill([*counts])
        runs = {row: Run(row, len(self.rows[row].fed), self.rows[row].tokens[len(self.rows[row].fed) :]) for row in counts}
        while runs:
            tokens = self._decode_and_choose(runs)
            runs = {}
            for row, token in tokens.items():
                guesses[row].append(token)
                if len(guesses[row]) < counts[row]:
                    runs[row] = Run(row, len(self.rows[row].fed), [token])
        self.forward.cache.record_version()
        return guesses

    def _cache_status(self) -> int:
        """Return 2 if the draft's cache is as it was left, 1 if it must be taken, and 0 if a call of the draft is using it."""
        shared, cache = self.draft.shared, self.forward.cache
        scheduler = shared.scheduler()
        if (scheduler is not None and not scheduler.idle) or shared.cache is not cache:
            return 0
        return 2 if shared.owner is self.owner and cache.is_unchanged() else 1

    def _take_cache(self) -> None:
        """Own the draft's cache. Calls of the draft, or other code, have used it, so nothing in it is of use any more."""
        shared, cache = self.draft.shared, self.forward.cache
        shared.owner = self.owner
        cache.prefixes.clear()
        for _ in range(0 if self.costs.known(self._n_computed(1)) else 3):
            began = time.perf_counter()
            self.decode_runs([Run(0, 0, [0])]).sum().item()  # which waits for the device
            self.costs.record(self._n_computed(1), time.perf_counter() - began)
        for each in self.rows.values():
            each.fed = []
        cache.record_version()

    def _prefill(self, rows: list[int]) -> None:
        """Drop guesses that were wrong from the cache of rows, and prefill the tokens that are missing, if they are many."""
        for row in rows:
            each = self.rows[row]
            del each.fed[min(common_prefix_length(each.fed, each.tokens), len(each.tokens) - 1) :]
            while len(each.tokens) - len(each.fed) > MAX_RUN:
                start = len(each.fed)
                chunk = each.tokens[start : min(start + tuning.PREFILL_CHUNK, len(each.tokens) - 1)]
                batch = RaggedBatch.from_segments([(row, start, len(chunk))], self.forward.device)
                inputs = torch.tensor(chunk, device=self.forward.device)
                self.forward.hidden_states(inputs, batch, logits_indices=inputs[:0])
                each.fed += chunk

    def _decode_and_choose(self, runs: Mapping[int, Run]) -> dict[int, int]:
        """Decode runs of some rows, and return the token that the draft chooses after each."""
        began = time.perf_counter()
        ordered = [runs[row] for row in sorted(runs)]
        logits, n = self.decode_runs(ordered), 0
        chosen: list[int] = []
        for run in ordered:
            n += len(run.tokens)
            self.rows[run.row].fed += run.tokens
            chosen.append(self._choose(self.rows[run.row], run.start + len(run.tokens), logits[n - 1 : n]))
        if model_parallel()[1] > 1:
            chosen = broadcast_from_rank0(torch.tensor(chosen, device=self.forward.device)).tolist()
        if n == len(ordered):  # one token per row
            self.costs.record(self._n_computed(n), time.perf_counter() - began)
        return dict(zip(sorted(runs), chosen, strict=True))

    def _choose(self, row: DraftRow, position: int, logits: torch.Tensor) -> int:
        """Return the token that the draft would sample at a position, given logits (1, vocab).

        A seeded answer is sampled with the same random numbers as the large model's, so that similar probabilities give the
        same token. Without a seed, the likeliest token is most likely to be right.
        """
        params, seed = row.request.sampling, row.request.seed
        if params.greedy or seed is None:
            return int(logits.argmax())
        where = torch.tensor([[seed], [position]], device=logits.device)
        return int(sample(logits, params, seeded_exponential(where[0], where[1], logits.shape[1])))


def check_speculation(
    speculate: str | None, draft: Any, llama: type, backend: str, tokenizer: Tokenizer, max_batch_size: int, max_seq_len: int
) -> None:
    """Raise InputError if a model cannot speculate in this way.

    llama: the class `Llama`, which a draft must have. backend, tokenizer, max_batch_size, max_seq_len: those of the model.
    """
    kind = CallOptions(speculate=speculate).speculate()
    if (kind or draft is not None) and backend == "eager":
        raise InputError(NO_EAGER)
    if kind == "draft" and draft is None:
        raise InputError(NO_DRAFT)
    if draft is not None:
        if not isinstance(draft, llama):
            raise InputError(f"draft is {describe(draft)}; it must be a Llama")
        check_draft(draft.engine, draft.tokenizer, tokenizer, max_batch_size, max_seq_len)  # type: ignore[attr-defined]


def set_draft(engine: "Engine", draft: Any, llama: type, tokenizer: Tokenizer) -> None:
    """Set the draft of an engine's model, as `Llama.draft` does. Raise InputError if the draft does not fit the model.

    llama: as in `check_speculation`. tokenizer: that of the engine's model.
    """
    model, shared = engine.model, engine.shared
    if groups.rank0_leads:
        raise InputError("the draft cannot be set in `lead`, which the other ranks follow; set it on all ranks before")
    if draft is not None:
        if getattr(draft, "model", None) is model:
            raise InputError("a model cannot be its own draft; give a smaller one with the same tokenizer")
        sizes = model.params.max_batch_size, model.params.max_seq_len
        check_speculation(None, draft, llama, engine.backend.name, tokenizer, *sizes)
        if shared.targets:
            raise InputError("this model is the draft of another one; a draft has no draft itself")
    elif engine.speculate == "draft":
        engine.speculate = ""
    if shared.draft is not None:
        shared.draft.engine.shared.targets.discard(model)
    shared.draft = draft
    if draft is not None:
        draft.engine.shared.targets.add(model)


def check_draft(
    draft: "Engine", draft_tokenizer: Tokenizer, tokenizer: Tokenizer, max_batch_size: int, max_seq_len: int
) -> None:
    """Raise InputError if a draft cannot guess the tokens of a model with this tokenizer and these sizes."""
    if not have_same_tokens(draft_tokenizer, tokenizer):
        raise InputError("the draft's tokenizer has other tokens; give a draft with the same tokenizer as its model")
    for name, needed in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len)):
        if (has := getattr(draft.model.params, name)) < needed:
            raise InputError(f"the draft is built with {name}={has}, less than {needed} of its model; build it with {needed}")
    if why := draft.why_reference_loop():
        raise InputError(f"the draft cannot guess: {why}; build it with another backend, unmodified")
    if draft.shared.draft is not None:  # two models that guess for each other could wait for each other
        raise InputError("the draft has a draft itself; set its `draft` to None")


def have_same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Return True if two tokenizers have the same tokens, BOS and EOS."""
    if (a.n_words, a.bos_id, a.eos_id) != (b.n_words, b.bos_id, b.eos_id):
        return False
    return a is b or all(a.decode([token]) == b.decode([token]) for token in range(a.n_words))
