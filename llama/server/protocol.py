"""Read requests in OpenAI's wire format. Each field is obeyed, or refused by its name; none is ignored.

`parse_chat` and `parse_completion` return a `Job`, whose prompts are tokens and whose options have been checked. They compute
nothing with the model. `ApiError` is the answer to anything else.
"""

import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from time import time
from typing import Any, NoReturn, TypeVar

from ..chat import ChatFormat, Dialog, continues_answer, is_unsafe
from ..engine.requests import MAX_TOP_LOGPROBS
from ..errors import InputError, describe, short_repr
from ..sampling import SamplingParams, check_bias_tokens
from ..tokenizer import Tokenizer, check_text, encode_prompt

MAX_STOPS = 16  # stop strings of a request
MAX_STOP_LENGTH = 1000  # characters of a stop string: the time to look for one in a text grows with the square of its length
MAX_LEGACY_LOGPROBS = 5  # `logprobs` of /v1/completions
OPENAI_OPTIONS = {"temperature": 1.0, "top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}  # with OpenAI's defaults
OUR_OPTIONS = ("top_k", "min_p", "typical_p", "repetition_penalty")  # sampling options that OpenAI's format does not have

# Fields of OpenAI's format that are not supported, each with the values that ask for nothing. null is always such a value.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "metadata": ({},), "store": (False,), "service_tier": ("auto", "default"),
}  # fmt: skip
UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = UNSUPPORTED | {
    "tools": ([],), "tool_choice": ("none",), "parallel_tool_calls": (), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip
UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = UNSUPPORTED | {"suffix": ("",), "best_of": (1,)}


T = TypeVar("T")


class ApiError(Exception):
    """An error as OpenAI's format has it. param: the field that is wrong. code: a name of the error for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def server_ending() -> ApiError:
    return ApiError(503, "the server is ending, and the answer is not complete; ask again later", code="server_ending")


@dataclass
class Job:
    """A request that has been checked: `n` answers to each prompt. The answers to prompt i have the indices i * n and up."""

    is_chat: bool
    model: str
    prompts: list[list[int]]  # the tokens of each; none for a dialog with special tags, which gets the refusal as its answer
    n: int
    max_tokens: int
    sampling: SamplingParams
    seed: int | None
    stop: tuple[str, ...]
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    logprobs: bool
    top_logprobs: int
    echo: bool
    stream: bool
    include_usage: bool
    continues_prompt: bool  # True if the text of an answer continues the prompt's: a completion, or an answer that has begun
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time()))

    @property
    def n_answers(self) -> int:
        return self.n * len(self.prompts)

    def options(self, index: int, limit: int) -> dict[str, Any]:
        """Return the options of the answer with an index, which gets at most `limit` tokens, for `Llama.agenerate_stream`."""
        options = {
            **vars(self.sampling), "logprobs": self.logprobs, "top_logprobs": self.top_logprobs,
            "seed": None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63,
            "min_new_tokens": min(self.min_tokens, limit), "ignore_eos": self.ignore_eos, "stop_token_ids": self.stop_token_ids,
        }  # fmt: skip
        if not self.is_chat:  # OpenAI's format has the end of a completion among the tokens of its log probabilities
            options |= {"echo": self.echo, "include_eos": self.logprobs}
        return options


@dataclass(frozen=True)
class ServedModel:
    """What a request is checked against."""

    name: str
    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_seq_len: int
    max_answers: int  # that may run or wait at a time


def refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    raise ApiError(400, message, param, code)


class Body:
    """The fields of a request. Each is taken once; what remains at the end is refused."""

    def __init__(self, raw: bytes) -> None:
        self.fields = _read_object(raw)

    def take(self, name: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
        """Return the value of a field, or the default if it is missing or null. Refuse a value that is not valid."""
        value = self.fields.pop(name, None)
        if value is None:
            return default
        if not is_valid(value):
            refuse(name, f"{name} is {describe(value)}; it must be {expected}")
        return value

    def take_flag(self, name: str) -> bool:
        return self.take(name, False, lambda value: isinstance(value, bool), "true or false")

    def take_count(self, name: str, default: T, least: int, most: int = 2**31 - 1) -> int | T:
        expected = f"a whole number from {least} to {most}"
        return self.take(name, default, lambda v: is_integer(v) and least <= v <= most, expected)

    def end(self, unsupported: dict[str, tuple[Any, ...]]) -> None:
        """Refuse the fields that are left, except unsupported ones whose value asks for nothing."""
        for name, value in self.fields.items():
            if name not in unsupported:
                refuse(name, f"unknown field {short_repr(name)}; remove it", "unknown_parameter")
            # False equals 0 in Python, but not in JSON.
            neutral = [each for each in unsupported[name] if isinstance(each, bool) == isinstance(value, bool)]
            if value is not None and value not in neutral:
                refuse(name, f"{name} is {describe(value)}, and {name} is not supported; remove it", "unsupported_parameter")


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_object(raw: bytes) -> dict[str, Any]:
    """Return a JSON object. Refuse keys that occur twice, and numbers and texts that are not JSON."""

    def refuse_number(text: str) -> NoReturn:
        raise ValueError(f"the number {text:.40} is not finite")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse_number(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(keys := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in an object")
        return keys

    try:
        value = json.loads(raw.decode(), parse_constant=refuse_number, parse_float=finite, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON in UTF-8: {e}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {describe(value)}; it must be a JSON object", code="invalid_json")
    return value


def parse_chat(raw: bytes, served: ServedModel) -> Job:
    """Read a request for /v1/chat/completions."""
    body = Body(raw)
    messages = body.take("messages", None, lambda value: isinstance(value, list), "a list of messages")
    if messages is None:
        refuse("messages", "messages is missing; it must be a list of messages")
    dialog: Any = [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    prompt = _encode_dialog(dialog, served)
    limits = [body.take_count(name, None, 1) for name in ("max_completion_tokens", "max_tokens")]
    given = {limit for limit in limits if limit is not None}
    if len(given) == 2:
        refuse("max_tokens", "max_tokens and max_completion_tokens are the same limit, and differ; give one of them")
    logprobs = body.take_flag("logprobs")
    top_logprobs = body.take_count("top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    if top_logprobs and not logprobs:
        refuse("top_logprobs", f"top_logprobs is {top_logprobs}, and logprobs is not true; give both, or remove top_logprobs")
    options = _take_options(body, served, [prompt], "messages")
    body.end(UNSUPPORTED_IN_CHAT)
    max_tokens = min(given, default=served.max_seq_len)
    _check_least(options["min_tokens"], max_tokens)
    return Job(
        True, max_tokens=max_tokens, logprobs=logprobs, top_logprobs=top_logprobs, echo=False,
        continues_prompt=continues_answer(dialog), **options,
    )  # fmt: skip


def _parse_message(message: Any, name: str) -> dict[str, Any]:
    """Return a message with its role and its content as one text."""
    if not isinstance(message, dict):
        refuse("messages", f"{name} is {describe(message)}; it must be an object with role and content")
    for key, value in message.items():
        if key not in ("role", "content") and value not in (None, []):
            refuse("messages", f"{name}: {short_repr(key)} is not supported; remove it", "unsupported_parameter")
    parsed = {key: message[key] for key in ("role", "content") if key in message}
    if isinstance(content := message.get("content"), list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
                refuse("messages", f'{name}: only content parts {{"type": "text", "text": ...}} are supported')
            _check(check_text, "messages", part["text"], f"{name}: a part of its content")
        parsed["content"] = "".join(part["text"] for part in content)
    return parsed


def _encode_dialog(dialog: Dialog, served: ServedModel) -> list[int]:
    """Return the tokens of a dialog, none if it contains special tags."""
    chat_format = served.chat_format
    _check(chat_format.check, "messages", dialog, "the dialog", True)
    return [] if is_unsafe(dialog, chat_format.tags) else _check(chat_format.encode, "messages", served.tokenizer, dialog)


def parse_completion(raw: bytes, served: ServedModel) -> Job:
    """Read a request for /v1/completions."""
    body = Body(raw)
    prompts = _parse_prompts(body.fields.pop("prompt", None), served)
    max_tokens = body.take_count("max_tokens", 16, 0)
    logprobs = body.take_count("logprobs", None, 0, MAX_LEGACY_LOGPROBS)
    echo = body.take_flag("echo")
    options = _take_options(body, served, prompts, "prompt")
    body.end(UNSUPPORTED_IN_COMPLETIONS)
    _check_least(options["min_tokens"], max_tokens)
    return Job(
        False, max_tokens=max_tokens, logprobs=logprobs is not None, top_logprobs=logprobs or 0, echo=echo,
        continues_prompt=True, **options,
    )  # fmt: skip


def _parse_prompts(prompt: Any, served: ServedModel) -> list[list[int]]:
    """Return the tokens of each prompt: a text, a list of texts, tokens, or a list of tokens each. Texts begin with BOS."""
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and is_integer(prompt[0]))
    prompts = [prompt] if is_one else prompt
    if not isinstance(prompts, list) or not prompts:
        refuse("prompt", f"prompt is {describe(prompt)}; it must be a text, tokens, or a list of either")
    if len(prompts) > served.max_answers:
        refuse("prompt", f"there are {len(prompts)} prompts, and {served.max_answers} is the limit; divide them")
    rows, tokenizer = [], served.tokenizer
    for i, each in enumerate(prompts):
        name = "prompt" if is_one else f"prompt[{i}]"
        if isinstance(each, list):
            if not each:
                refuse("prompt", f"{name} has no tokens; begin it with BOS ({tokenizer.bos_id})")
            for token in each:
                if not is_integer(token) or not 0 <= token < tokenizer.n_words:
                    last = tokenizer.n_words - 1
                    refuse("prompt", f"{name}: {describe(token)} is no token; tokens are whole numbers from 0 to {last}")
            rows.append(each)
        else:
            _check(check_text, "prompt", each, name)
            rows.append(encode_prompt(tokenizer, each))
    return rows


def _take_options(body: Body, served: ServedModel, prompts: list[list[int]], prompt_field: str) -> dict[str, Any]:
    """Take the fields that both kinds of requests have, and check the lengths of the prompts."""
    for prompt in prompts:
        if len(prompt) > served.max_seq_len:
            refuse(
                prompt_field,
                f"the prompt has {len(prompt)} tokens, more than the context of {served.max_seq_len}; shorten it",
                "context_length_exceeded",
            )
    model = body.take("model", served.name, lambda value: isinstance(value, str), "a text")
    if model != served.name:
        message = f"the model {short_repr(model)} is not here; this server has {served.name!r}"
        raise ApiError(404, message, "model", "model_not_found")
    sampling: dict[str, Any] = dict(OPENAI_OPTIONS)
    for name in (*sampling, *OUR_OPTIONS):
        sampling[name] = body.take(name, sampling.get(name), lambda v: isinstance(v, (int, float)), "a number")
        _check(lambda name=name: SamplingParams(**{name: sampling[name]}), name)
    sampling["logit_bias"] = _take_logit_bias(body, served.tokenizer.n_words)
    stop = body.take("stop", [], lambda value: isinstance(value, (str, list)), "a text, or a list of texts")
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        refuse("stop", f"{len(stops)} stop strings; at most {MAX_STOPS} are supported")
    for i, text in enumerate(stops):
        _check(check_text, "stop", text, f"stop string {i}")
        if len(text) > MAX_STOP_LENGTH:
            refuse("stop", f"stop string {i} has {len(text):,} characters; at most {MAX_STOP_LENGTH:,} are supported")
        if not text:
            refuse("stop", f"stop string {i} is empty: every answer would end before it begins; leave it out")
    is_seed = f"a whole number from {-(2**63)} to {2**63 - 1}"
    seed = body.take("seed", None, lambda v: is_integer(v) and -(2**63) <= v < 2**63, is_seed)
    n = body.take_count("n", 1, 1) or 1
    if n * len(prompts) > served.max_answers:
        refuse("n", f"the request asks for {n * len(prompts)} answers, and {served.max_answers} is the limit; divide it")
    body.take("user", None, lambda value: isinstance(value, str), "a text")  # OpenAI's label of an end user; changes no answer
    stream = body.take_flag("stream")
    stream_options = body.take("stream_options", {}, lambda value: isinstance(value, dict), "an object")
    if stream_options and not stream:
        refuse("stream_options", "stream_options is for stream=true; remove it")
    for name in stream_options.keys() - {"include_usage"}:
        refuse("stream_options", f"stream_options has {short_repr(name)}; only include_usage is supported")
    include_usage = stream_options.get("include_usage")
    if not (include_usage is None or isinstance(include_usage, bool)):
        refuse("stream_options", f"include_usage is {describe(include_usage)}; it must be true or false")
    return dict(
        model=served.name, prompts=prompts, n=n, sampling=SamplingParams(**sampling), seed=seed, stop=tuple(stops),
        stream=stream, include_usage=bool(include_usage), **_take_end(body, served.tokenizer.n_words),
    )  # fmt: skip


def _take_end(body: Body, n_words: int) -> dict[str, Any]:
    """Return what ends an answer besides stop strings and its limit, by vLLM's names."""
    stop_token_ids = tuple(body.take("stop_token_ids", (), lambda value: isinstance(value, list), "a list of tokens"))
    for token in stop_token_ids:
        if not is_integer(token) or not 0 <= token < n_words:
            wrong = f"stop_token_ids: {describe(token)} is no token; tokens are whole numbers from 0 to {n_words - 1}"
            refuse("stop_token_ids", wrong)
    if len(stop_token_ids) > MAX_STOPS:
        refuse("stop_token_ids", f"{len(stop_token_ids)} tokens in stop_token_ids; at most {MAX_STOPS} are supported")
    return {
        "min_tokens": body.take_count("min_tokens", 0, 0), "ignore_eos": body.take_flag("ignore_eos"),
        "stop_token_ids": stop_token_ids,
    }  # fmt: skip


def _check_least(min_tokens: int, max_tokens: int) -> None:
    if min_tokens > max_tokens:
        refuse("min_tokens", f"min_tokens is {min_tokens}, more than max_tokens, {max_tokens}; change one of them")


def _take_logit_bias(body: Body, n_words: int) -> dict[int, float]:
    """Return the bias of each token. The keys of a JSON object are texts."""
    given = body.take("logit_bias", {}, lambda value: isinstance(value, dict), "an object of tokens and numbers")
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 20):
            refuse("logit_bias", f"logit_bias: {describe(token)} is no token; tokens are whole numbers from 0 to {n_words - 1}")
    bias = {int(token): value for token, value in given.items()}
    if len(bias) < len(given):
        refuse("logit_bias", "logit_bias has a token twice")
    _check(lambda: SamplingParams(logit_bias=bias), "logit_bias")
    _check(check_bias_tokens, "logit_bias", bias, n_words)
    return bias


def _check(check: Callable[..., T], param: str, *arguments: Any) -> T:
    """Run a check of the library, and return its result. Its InputError becomes an ApiError about `param`."""
    try:
        return check(*arguments)
    except InputError as e:
        refuse(param, str(e))
