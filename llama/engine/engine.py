"""The engine: requests of tokens in, new tokens out, one by one. It knows nothing of text."""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .. import tuning
from ..distributed.failures import defer_signals, propagate_failure
from ..distributed.groups import global_rank
from ..distributed.progress import progress
from ..errors import InputError
from ..kernels.host_memory import raise_malloc_threshold
from ..model import Transformer
from ..sampling import token_logprobs
from .backend import Backend
from .checks import check_logprobs, device_of
from .forward import EngineForward
from .kv_cache import KVCache, RaggedBatch
from .prefill import score_tokens
from .reference_loop import ReferenceLoop, move_buffers
from .requests import GeneratedToken, GenerationCall
from .scheduler import Scheduler
from .shared_state import shared_state_of
from .unmodified import why_modified


class Engine:
    """Run calls on a model with a backend. One call at a time owns the cache, and one thread at a time runs the model."""

    def __init__(self, model: Transformer, backend: Backend) -> None:
        self.model, self.backend = model, backend
        self.announced: str | None = None  # the last reason for the slower way that was printed
        self.shared = shared_state_of(model)
        self.lock = self.shared.lock
        if why_modified(model) is None:
            self.forward()  # allocates the cache now, so that the first call need not wait for it
        raise_malloc_threshold()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the lock, which belongs to this process."""
        return Engine, (self.model, self.backend)

    def check_sizes(self) -> None:
        """Raise InputError if a caller has set params beyond the cache that the model was built with."""
        for layer in getattr(self.model, "layers", ()):
            cache_k = getattr(getattr(layer, "attention", None), "cache_k", None)
            if cache_k is None or cache_k.ndim != 4:
                return
            for name, size in zip(("max_batch_size", "max_seq_len"), cache_k.shape, strict=False):
                if (asked := getattr(self.model.params, name)) > size:
                    raise InputError(
                        f"params.{name} is {asked}, but the model was built with a cache for {size}: build it anew"
                    )
            return

    def why_reference_loop(self) -> str | None:
        """Return why a call runs the model's own `forward`, in words; None if the engine's forward takes it."""
        if self.backend.name == "eager":
            return "the backend is eager"
        return why_modified(self.model)

    def announce(self, why: str) -> None:
        """Print once per reason, on stderr, that generation is slower now."""
        if self.backend.name != "eager" and why != self.announced and global_rank() == 0:
            print(f"llama: {why}: generating through the model's own forward, which is slower", file=sys.stderr)
        self.announced = why

    def forward(self) -> EngineForward:
        """Return the engine's forward over the model's weights as they are now, with its cache, allocated if none fits."""
        if self.shared.cache is None or not self.shared.cache.belongs_to(self.model):
            self.shared.cache = KVCache.adopt(self.model)
        return EngineForward(self.model, self.shared.cache)

    def without_autocast(self) -> torch.autocast:
        """Compute in the dtype that the model was built with, whatever a caller's autocast says."""
        return torch.autocast(device_of(self.model).type, enabled=False)

    @torch.inference_mode()
    def run(self, call: GenerationCall) -> Iterator[GeneratedToken]:
        """Yield each request's new tokens as they are generated, with `call.echo` its prompt's first. EOS is not yielded.

        Either all requests have a seed or none has. `call.reuse`: a single request skips those first tokens whose keys and
        values the previous call left in the cache, if that had `reuse` too.
        """
        for request in call.requests:
            if request.max_new_tokens == 0 and not request.finish_reason:
                request.finish_reason = "length"
        if call.echo and not call.logprobs:
            for index, request in enumerate(call.requests):
                yield from (GeneratedToken(index, token, None) for token in request.prompt)
        if not call.requests or (not call.scores_prompts and all(r.finish_reason for r in call.requests)):
            return
        self.check_sizes()
        loop: Scheduler | ReferenceLoop
        with self.lock, propagate_failure():
            if why := self.why_reference_loop():
                self.announce(why)
                loop = ReferenceLoop(self.model, self.shared, call)
            else:
                loop = Scheduler(self.model, self.forward(), self.backend, self.shared, call)
        while not loop.finished:
            with self.lock, propagate_failure(), defer_signals(), self.without_autocast():
                prompt_tokens = loop.step()
            yield from prompt_tokens
            yield from loop.emit_tokens()

    @torch.inference_mode()
    def score(self, sequences: list[list[int]], starts: list[int], labels: list[str]) -> list[list[float]]:
        """Return the log probabilities of each sequence's tokens from its start (1 or more) on.

        Whole sequences run side by side, PREFILL_CHUNK tokens or one sequence at a time. The engine's forward neither needs nor
        touches the cache for it.
        """
        self.check_sizes()
        if why := self.why_reference_loop():
            self.announce(why)
            move_buffers(self.model)
            self.shared.owner = None  # it writes into the cache
        forward = None if why else self.forward()
        batches: list[list[int]] = []
        room = 0
        for i, sequence in enumerate(sequences):
            if why or len(sequence) > room:
                batches, room = [*batches, []], tuning.PREFILL_CHUNK
            batches[-1].append(i)
            room -= len(sequence)
        results: list[list[float]] = []
        device = device_of(self.model)
        for members in progress(batches, lambda members: sum(len(sequences[i]) for i in members), "scoring", "tokens"):
            tokens = torch.tensor([token for i in members for token in sequences[i]], device=device)
            offsets = itertools.accumulate((len(sequences[i]) for i in members), initial=0)
            scored = [
                [first + n for n in range(starts[i], len(sequences[i]))] for i, first in zip(members, offsets, strict=False)
            ]
            indices = torch.tensor([n for each in scored for n in each], dtype=torch.int64, device=device)
            with defer_signals(), self.without_autocast():
                if forward is None:
                    logits = self.model.forward(tokens[None], 0)[0].float()
                    logprobs = iter(token_logprobs(logits[indices - 1], tokens[indices]).tolist())
                else:
                    batch = RaggedBatch.from_segments([(row, 0, len(sequences[i])) for row, i in enumerate(members)], device)
                    hidden = forward.hidden_states(tokens, batch, use_cache=False, logits_indices=indices - 1)
                    logprobs = iter(score_tokens(forward.logits, hidden, tokens[indices]))
            for i, each in zip(members, scored, strict=True):
                results.append(list(itertools.islice(logprobs, len(each))))
                check_logprobs(self.model, results[-1], labels[i])
        return results
