"""Collect the tokens of a call into one result for each request."""

from collections.abc import Callable, Iterator
from typing import Any

from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from .incremental_text import IncrementalText
from .requests import GeneratedToken, GenerationCall
from .results import GenerationResult


def collect_results(call: GenerationCall, tokens: Iterator[GeneratedToken], tokenizer: Tokenizer) -> Iterator[GenerationResult]:
    """Yield one result per request, in the order of the requests. A result is yielded once its answer and all earlier answers
    are complete.

    If `call.stop` is None, tokens are not decoded to text. Otherwise each answer ends before the first stop string.
    """
    results = [GenerationResult(request) for request in call.requests]
    texts = [IncrementalText(tokenizer, call.stop) for _ in results] if call.stop is not None else []
    if call.echo:
        for result, text in zip(results, texts, strict=False):
            result.text = text.begin(result.request.prompt)
    n_yielded = 0
    for index, token, logprob in tokens:
        # The engine sets a request's finish reason after its last token has been taken. A finished request is therefore seen
        # here when the engine yields the next token of any request.
        while not call.echo and results[n_yielded].request.finish_reason:
            yield _flush(results[n_yielded], texts[n_yielded : n_yielded + 1])
            n_yielded += 1
        result = results[index]
        result.tokens.append(token)
        if logprob is not None:
            result.logprobs.append(logprob)
        # Skip echoed tokens of the prompt: `result.text` begins with the text of the prompt.
        if texts and result.request.num_new_tokens:
            result.text += texts[index].push(token)
            if texts[index].stopped:
                result.request.finish_reason = "stop"
    for i in range(n_yielded, len(results)):
        yield _flush(results[i], texts[i : i + 1])


def _flush(result: GenerationResult, text: list[IncrementalText]) -> GenerationResult:
    """Add to a result the text that has been held back, and return the result."""
    result.text += "".join(t.end() for t in text)
    return result


def results_of_replaced_generate(
    generate: Callable[..., Any], call: GenerationCall, tokenizer: Tokenizer
) -> list[GenerationResult]:
    """Return results from `generate`, a function with which a caller has replaced `Llama.generate`.

    `generate` receives the arguments that Meta's own `Llama.generate` has, and any other option only if its value is not the
    default.
    """
    asked = [request for request in call.requests if request.prompt]
    defaults = SamplingParams()
    options = {
        name: value
        for name, value in vars(call.sampling).items()
        if name not in ("temperature", "top_p") and value != getattr(defaults, name)
    }
    if any(request.seed is not None for request in asked):
        options["seed"] = [request.seed for request in asked]
    tokens, logprobs = generate(
        prompt_tokens=[request.prompt for request in asked],
        max_gen_len=max((request.max_new_tokens for request in asked), default=0),
        temperature=call.sampling.temperature, top_p=call.sampling.top_p,
        logprobs=call.logprobs, **({"echo": True} if call.echo else {}), **options,
    )  # fmt: skip
    returned = dict(zip(map(id, asked), zip(tokens, logprobs or [[] for _ in tokens], strict=True), strict=True))
    results = []
    for request in call.requests:
        result, text = GenerationResult(request), IncrementalText(tokenizer, call.stop or ())
        own_tokens, own_logprobs = returned.get(id(request), ([], []))
        result.tokens, result.logprobs = list(own_tokens), list(own_logprobs)
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
