"""Collect the tokens of a call into one result for each request."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import InputError
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from .incremental_text import IncrementalText
from .requests import GeneratedToken, GenerationCall, Request
from .results import GenerationResult
from .stream import end_text, push_token


class ResultCollector:
    """Collect the tokens of a call into one result for each request.

    If `call.stop` is None and no request has stop strings, tokens are not decoded to text.
    """

    def __init__(self, call: GenerationCall, tokenizer: Tokenizer) -> None:
        self.call = call
        self.results = [GenerationResult(request, speculates=bool(call.speculate)) for request in call.requests]
        decoded = call.requests if call.stop is not None or call.has_stops else []
        self.texts = [IncrementalText.of_answer(call, request, tokenizer) for request in decoded]
        if call.echo:
            for result, text in zip(self.results, self.texts, strict=False):
                result.text = text.prompt_text
        self.n_taken = 0

    def push(self, token: GeneratedToken) -> None:
        """Add a token to the result of its request. A stop string ends the answer."""
        result = self.results[token.prompt_index]
        result.tokens.append(token.token)
        if token.logprob is not None:
            result.logprobs.append(token.logprob)
        if token.top_logprobs is not None:
            result.top_logprobs.append(token.top_logprobs)
        # Skip echoed tokens of the prompt: `result.text` begins with the text of the prompt.
        if self.texts and result.request.num_new_tokens:
            result.text += push_token(result.request, self.texts[token.prompt_index], token)

    def take_finished(self) -> Iterator[GenerationResult]:
        """Yield, in order, the results that have not been taken yet, up to the first whose answer is not complete.

        With `echo`, no result is complete before the end.
        """
        while not self.call.echo and self.n_taken < len(self.results) and self.results[self.n_taken].request.finish_reason:
            yield self._take()

    def finish(self) -> list[GenerationResult]:
        """Return all results that have not been taken yet. No more tokens will come."""
        return [self._take() for _ in range(self.n_taken, len(self.results))]

    def _take(self) -> GenerationResult:
        """Return the next result, with the text that has been held back."""
        result, text = self.results[self.n_taken], self.texts[self.n_taken : self.n_taken + 1]
        result.text += "".join(end_text(result.request, t) for t in text)
        self.n_taken += 1
        return result


def collect_results(call: GenerationCall, tokens: Iterator[GeneratedToken], tokenizer: Tokenizer) -> Iterator[GenerationResult]:
    """Yield one result per request, in the order of the requests. A result is yielded once its answer and all earlier answers
    are complete.
    """
    collector = ResultCollector(call, tokenizer)
    with contextlib.closing(tokens):  # type: ignore[type-var]  # after an error, a traceback may keep `tokens` alive
        for token in tokens:
            # The engine sets a request's finish reason after its last token has been taken. A finished request is therefore
            # seen here when the engine yields the next token of any request.
            yield from collector.take_finished()
            collector.push(token)
    yield from collector.finish()


def results_of_replaced_generate(
    generate: Callable[..., Any], call: GenerationCall, tokenizer: Tokenizer, speculate: str
) -> list[GenerationResult]:
    """Return results from `generate`, a function with which a caller has replaced `Llama.generate`.

    `generate` receives the arguments that Meta's own `Llama.generate` has, and any other option only if its value is not the
    default. speculate: the default of that option.
    """
    if call.top_logprobs:
        raise InputError("generate has been replaced, and returns no top_logprobs; leave top_logprobs out")
    asked = [request for request in call.requests if request.prompt]
    tokens, logprobs = generate(
        prompt_tokens=[request.prompt for request in asked],
        max_gen_len=max((request.max_new_tokens for request in asked), default=0),
        logprobs=call.logprobs, **({"echo": True} if call.echo else {}), **_options_of(call, asked, speculate),
    )  # fmt: skip
    returned = dict(zip(map(id, asked), zip(tokens, logprobs or [[] for _ in tokens], strict=True), strict=True))
    results = []
    for request in call.requests:
        result, text = GenerationResult(request), IncrementalText(tokenizer, request.stop)
        if request.continues_prompt and not call.echo:
            text.begin(request.prompt)
        own_tokens, own_logprobs = returned.get(id(request), ([], []))
        limit = request.max_new_tokens + (len(request.prompt) if call.echo else 0)
        result.tokens, result.logprobs = list(own_tokens)[:limit], list(own_logprobs)[:limit]
        for n, token in enumerate(result.tokens, 1):
            result.text += text.push(token)
            if text.stopped:
                result.tokens, result.logprobs, request.finish_reason = result.tokens[:n], result.logprobs[:n], "stop"
                break
        result.text += text.end()
        request.num_new_tokens = len(result.tokens) - (len(request.prompt) if call.echo else 0)
        request.finish_reason = request.finish_reason or (
            "stop" if request.num_new_tokens < request.max_new_tokens else "length"
        )
        results.append(result)
    return results


def _options_of(call: GenerationCall, asked: list[Request], speculate: str) -> dict[str, Any]:
    """Return the options for a replaced `generate`: one value if all requests have the same, otherwise one for each request."""
    defaults: dict[str, Any] = {**vars(SamplingParams()), "min_new_tokens": 0, "logits_processor": None}
    options: dict[str, Any] = {}
    for name, default in defaults.items():
        values = [getattr(request if hasattr(request, name) else request.sampling, name) for request in asked]
        values = values or [default]
        equal = values.count(values[0]) == len(values)
        if not equal or values[0] != default or name in ("temperature", "top_p"):
            options[name] = values[0] if equal else values
    if any(request.seed is not None for request in asked):
        options["seed"] = [request.seed for request in asked]
    if call.stop_token_ids:
        options["stop_token_ids"] = [*call.stop_token_ids]
    if call.speculate != speculate:
        options["speculate"] = call.speculate or False
    return options | ({"ignore_eos": True} if call.ignore_eos else {})
