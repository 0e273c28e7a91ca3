"""The engine: requests of tokens in, new tokens out, one by one. It knows nothing of text."""

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import tuning
from ..distributed.failures import defer_signals, propagate_failure
from ..distributed.groups import global_rank
from ..distributed.progress import progress
from ..errors import InputError, NonFiniteError
from ..kernels.host_memory import raise_malloc_threshold
from ..model import Transformer
from ..sampling import sample_top_p, token_logprobs
from .backend import Backend
from .checks import device_of, is_valid_logprob
from .decode_state import Sampler
from .forward import EngineForward
from .kv_cache import KVCache, RaggedBatch, prefill_chunks
from .reference_loop import ReferenceLoop, move_buffers
from .requests import GeneratedToken, GenerationCall, Request
from .scheduler import Scheduler
from .unmodified import why_modified


class SharedState:
    """What all engines of one model share: a lock, the KV cache once there is one, and the call that owns it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.cache: KVCache | None = None
        self.owner: object = None


_SHARED: weakref.WeakKeyDictionary[nn.Module, SharedState] = weakref.WeakKeyDictionary()


class Engine:
    """Run calls on a model with a backend. One call at a time owns the cache, and one thread at a time runs the model."""

    def __init__(self, model: Transformer, backend: Backend) -> None:
        self.model, self.backend = model, backend
        self.announced: str | None = None  # the last reason for the slower way that was printed
        self.shared = _SHARED.setdefault(model, SharedState())
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
    def run(
        self, call: GenerationCall, eos_id: int, sampler: Sampler = sample_top_p, watched: bool = False
    ) -> Iterator[GeneratedToken]:
        """Yield each request's new tokens as they are generated, with `call.echo` its prompt's first. EOS is not yielded.

        Either all requests have a seed or none has. `call.reuse`: a single request skips those first tokens whose keys and
        values the previous call left in the cache, if that had `reuse` too. sampler: chooses from probabilities (B, vocab) and
        top_p. watched: the caller's code runs between two tokens, and may change the model.
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
                loop = ReferenceLoop(self, call, eos_id, sampler)
            else:
                loop = Scheduler(self, call, eos_id, sampler, watched)
        while not loop.finished:
            with self.lock, propagate_failure(), defer_signals(), self.without_autocast():
                prompt_tokens = loop.step()
            yield from prompt_tokens
            yield from loop.emit_tokens()

    def prefill(
        self, forward: EngineForward, rows: list[int], requests: list[Request], start: int, scored: bool, quiet: bool
    ) -> tuple[torch.Tensor, list[list[float]]]:
        """Run each prompt from its token `start` on, all prompts side by side, PREFILL_CHUNK tokens at a time.

        Return the hidden state after each prompt's last token, (B, dim), and, if `scored`, the log probabilities of each
        prompt's tokens; 0.0 for the first.
        """
        prompts, device = [request.prompt[start:] for request in requests], forward.device
        lengths = [len(p) for p in prompts]
        tokens = torch.tensor([token for p in prompts for token in p] + [0], device=device)
        last_hidden, logprobs, first = [], [0.0], 0
        chunks = list(prefill_chunks(lengths, tuning.PREFILL_CHUNK, tuning.ATTENTION_CHUNK))
        bar = progress(chunks, lambda chunk: sum(n for _, _, n in chunk), "reading prompts", "tokens")
        for pieces in chunks if quiet else bar:
            ends = list(itertools.accumulate(n for _, _, n in pieces))
            batch = RaggedBatch.from_segments([(rows[i], start + done, n) for i, done, n in pieces], device)
            final = [end - 1 for end, (i, done, n) in zip(ends, pieces, strict=True) if done + n == lengths[i]]
            final_indices = torch.tensor(final, dtype=torch.int64, device=device)
            wanted = None if scored else final_indices
            hidden = forward.hidden_states(tokens[first : first + ends[-1]], batch, logits_indices=wanted)
            if scored:
                logprobs += score_tokens(forward.logits, hidden, tokens[first + 1 :])
                hidden = hidden[final_indices]
            last_hidden.append(hidden)
            first += ends[-1]
        starts = itertools.accumulate(lengths, initial=0)
        by_prompt = [[0.0, *logprobs[i + 1 : i + n]] if scored else [] for i, n in zip(starts, lengths, strict=False)]
        return torch.cat(last_hidden), by_prompt

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
                self.check_logprobs(results[-1], labels[i])
        return results

    def check_logprobs(self, logprobs: list[float], label: str) -> None:
        """Raise NonFiniteError if one of a prompt's log probabilities is not valid."""
        if not all(map(is_valid_logprob, logprobs)):
            raise self._nonfinite_error(label, "a token's log probability is")

    def nonfinite_logits(self, request: Request, position: int) -> NonFiniteError:
        """Return the error for a row whose logits are not finite."""
        what = f"the logits of new token {request.num_new_tokens + 1}, at position {position}, are"
        return self._nonfinite_error(request.label, what)

    def _nonfinite_error(self, label: str, what: str) -> NonFiniteError:
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        wider = {"float16": "'bfloat16' or 'float32'", "bfloat16": "'float32'"}.get(dtype)
        or_dtype = f", or build with dtype={wider}: {dtype} may not hold what they compute" if wider else ""
        return NonFiniteError(f"{label}: {what} not finite; the weights are damaged: compare with checklist.chk{or_dtype}")


def score_tokens(logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, following: torch.Tensor) -> list[float]:
    """Return the log probabilities of the tokens that follow positions with these hidden states (N, dim)."""
    logprobs: list[float] = []
    for i in range(0, len(hidden), tuning.LOGPROB_CHUNK):
        chunk = logits(hidden[i : i + tuning.LOGPROB_CHUNK])
        logprobs += token_logprobs(chunk, following[i : i + len(chunk)]).tolist()
    return logprobs
