"""Generate as the reference does, with `Transformer.forward(tokens, start_pos)`, for models that a caller has modified."""

import collections
import math
from collections.abc import Iterator

import torch
from torch import nn

from ..model import Attention, Transformer
from ..sampling import ranked_logprobs
from .checks import check_logprobs, device_of, nonfinite_logits_error
from .decode_state import DecodeState, sampling_options
from .logits_processors import ProcessedRow
from .requests import GeneratedToken, GenerationCall, Request, TokenScore, token_score
from .shared_state import CacheOwner, SharedState, ended_early


class ReferenceLoop:
    """Run one call as the reference does, without sharing the batch with other calls.

    Prefill a batch up to the end of its shortest prompt, then compute one position at a time. A longer prompt keeps its tokens
    at these positions, instead of sampled ones. More than max_batch_size prompts run as several batches, one after another.
    """

    def __init__(self, model: Transformer, shared: SharedState, call: GenerationCall, n_words: int | None = None) -> None:
        self.n_words = n_words  # see `Engine.n_words`
        self.model, self.shared, self.call, self.requests = model, shared, call, call.requests
        self.waiting = collections.deque(range(len(self.requests)))
        self.running: dict[int, int] = {}  # maps a row of the batch to the index of its request
        self.sampled: list[GeneratedToken] = []
        self.start, self.end = 0, 0  # the next forward computes positions start to end - 1
        self.batch: list[int] = []  # for each row, the index of its request
        self.tokens = torch.zeros(0, 0, dtype=torch.int64, device="cpu")  # tokens of prompts and answers, one row each
        self.state = DecodeState(0, 0, device_of(model))
        shared.owner = self.owner = CacheOwner(call.name)
        move_buffers(model)

    @property
    def finished(self) -> bool:
        return not self.waiting and not self.running

    def step(self) -> list[GeneratedToken]:
        """Run the model once, and sample the next token of each row. `emit_tokens` yields the sampled tokens.

        Return the prompt tokens that have been scored, with their log probabilities, if the call scores prompts.
        """
        if why := self.shared.why_not_owner(self.owner):
            raise ended_early(self.call.name, why)
        prompt_tokens = [] if self.running else self.begin_batch()
        requests, end = [self.requests[index] for index in self.batch], self.end
        logits = self.model.forward(self.tokens[:, self.start : end], self.start)[..., : self.n_words].float()
        self.state.logits = logits[:, -1]
        if self.call.scores_prompts:
            following = self.tokens[:, self.start + 1 : end + 1]
            logits = logits[:, : following.shape[1]]
            scores = self.scores(logits.flatten(0, 1), following.flatten())
            for row, (index, request) in enumerate(zip(self.batch, requests, strict=True)):
                n_scored = min(max(0, len(request.prompt) - self.start - 1), following.shape[1])
                of_prompt = scores[row * following.shape[1] :][:n_scored]
                check_logprobs(self.model, [score.logprob for score in of_prompt], request.label)
                prompt_tokens += [
                    GeneratedToken(index, request.prompt[self.start + 1 + n], *score) for n, score in enumerate(of_prompt)
                ]
        self.start, self.end = end, end + 1
        self.sampled = []
        if end < self.tokens.shape[1]:
            self.sample(requests, end)
        self.release_finished()
        return prompt_tokens

    def begin_batch(self) -> list[GeneratedToken]:
        """Begin the next batch of requests. Return the first token of each prompt, if the call scores prompts."""
        size = min(len(self.waiting), self.model.params.max_batch_size)
        self.batch = [self.waiting.popleft() for _ in range(size)]
        self.running = dict(enumerate(self.batch))
        requests, device = [self.requests[index] for index in self.batch], device_of(self.model)
        ends = [len(r.prompt) + (0 if r.finish_reason else r.max_new_tokens) for r in requests]
        self.tokens = torch.zeros(len(requests), max(ends), dtype=torch.int64, device="cpu")
        for tokens, request in zip(self.tokens, requests, strict=True):
            tokens[: len(request.prompt)] = torch.tensor(request.prompt)
        self.tokens = self.tokens.to(device)
        self.start, self.end = 0, min(len(r.prompt) for r in requests)
        self.state = DecodeState(len(requests), 0, device)
        if not self.call.scores_prompts:
            return []
        first = TokenScore(0.0, [] if self.call.top_logprobs else None)
        return [GeneratedToken(index, self.requests[index].prompt[0], *first) for index in self.batch]

    def scores(self, logits: torch.Tensor, tokens: torch.Tensor) -> list[TokenScore]:
        """Return the scores of tokens (N,) under logits (N, vocab), or scores of None if the call asks for none."""
        if not self.call.logprobs:
            return [TokenScore()] * len(tokens)
        n_top = self.call.top_logprobs or 0
        values = [each.tolist() for each in ranked_logprobs(logits, tokens, n_top)]
        return [token_score(values, i, n_top) for i in range(len(tokens))]

    def sample(self, requests: list[Request], end: int) -> None:
        """Sample a token at position `end` for each row. A row whose prompt has a token at `end` keeps the prompt token."""
        self.update_state(requests, end)
        tokens, largest = self.state.sample()
        for _, failure in self.state.failures:
            raise failure
        scores = self.scores(self.state.logits, tokens)
        largest_logits, sampled = largest.tolist(), tokens.tolist()
        for row, (index, request) in enumerate(zip(self.batch, requests, strict=True)):
            if row not in self.running or len(request.prompt) > end or request.finish_reason:
                if len(request.prompt) <= end:
                    self.tokens[row, end] = sampled[row]
                continue
            if not math.isfinite(largest_logits[row]):
                raise nonfinite_logits_error(self.model, request, request.num_new_tokens, end)
            self.tokens[row, end] = sampled[row]
            if sampled[row] in self.call.end_tokens:
                request.finish_reason = "stop"
            if sampled[row] not in self.call.end_tokens or self.call.include_eos:
                self.sampled.append(GeneratedToken(index, sampled[row], *scores[row]))

    def update_state(self, requests: list[Request], end: int) -> None:
        """Let the state of the batch hold the tokens before position `end`, instead of those that it has sampled.

        Rows keep the options of their requests until the batch ends, so that all are sampled each time, as in the reference.
        """
        state, n = self.state, len(requests)
        if not state.options:
            state.admit([*range(n)], requests, [sampling_options(self.call, r) for r in requests], state.logits)
        state.positions = torch.full_like(state.positions, end)
        for row, request in enumerate(requests):
            state.set_answer(row, request.prompt, self.tokens[row, len(request.prompt) : end])
        state.processed = {
            row: ProcessedRow(request.logits_processor, request.label, self.tokens[row, :end].tolist())
            for row, request in enumerate(requests)
            if request.logits_processor and row in self.running and len(request.prompt) <= end and not request.finish_reason
        }

    def emit_tokens(self) -> Iterator[GeneratedToken]:
        """Yield the sampled tokens. A consumer sets the `finish_reason` of a request to end its answer."""
        for token in self.sampled:
            request = self.requests[token.prompt_index]
            request.num_new_tokens += token.token not in self.call.end_tokens
            yield token
            if request.num_new_tokens == request.max_new_tokens and not request.finish_reason:
                request.finish_reason = "length"
        self.sampled = []
        self.release_finished()

    def release_finished(self) -> None:
        """Free each row whose request has ended. If the call scores prompts, free it only once its prompt is fully scored."""
        for row, index in list(self.running.items()):
            request = self.requests[index]
            if request.finish_reason and self.start >= (len(request.prompt) if self.call.scores_prompts else 0):
                del self.running[row]


def move_buffers(model: nn.Module) -> None:
    """Move KV caches to the device and dtype of the model's parameters, and RoPE rotations to the device only.

    The model's `forward` would move them too, but in inference mode. The moved tensors could then not be modified outside of
    inference mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules() if isinstance(model, nn.Module) else []:
            if isinstance(module, Attention) and not module.cache_k.is_meta:
                like = next(module.parameters())
                module.cache_k, module.cache_v = module.cache_k.to(like), module.cache_v.to(like)
            if isinstance(module, Transformer):
                module.freqs_cis = module.freqs_cis.to(device_of(module))
