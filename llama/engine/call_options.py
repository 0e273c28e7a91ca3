"""The options of calls, as callers give them: check them, and give each prompt its own."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypedDict, TypeVar, get_type_hints

from ..errors import InputError, check_count, check_flag, describe, is_integer, short_traceback
from ..sampling import SamplingParams, check_bias_tokens
from .incremental_text import check_stop
from .logits_processors import LogitsProcessor

P = ParamSpec("P")
T = TypeVar("T")

Numbers = float | Iterable[float | None] | None  # a number for all prompts, or one for each
Integers = int | Iterable[int | None] | None


class StreamOptions(TypedDict, total=False):
    """The keyword options that all calls for answers have. `Llama` describes them."""

    top_k: Integers
    min_p: Numbers
    repetition_penalty: Numbers
    logit_bias: Mapping[int, float] | None
    seed: int | Iterable[int] | None
    typical_p: Numbers
    frequency_penalty: Numbers
    presence_penalty: Numbers
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool | None
    min_new_tokens: Integers
    logits_processor: LogitsProcessor | Iterable[LogitsProcessor | None] | None
    speculate: str | bool | None


class AnswerOptions(StreamOptions, total=False):
    """The keyword options of calls that may give several answers to a prompt."""

    n: int | None


DEFAULTS: dict[str, Any] = dict(
    top_k=0, min_p=0.0, repetition_penalty=1.0, logit_bias=None, seed=None, typical_p=1.0, frequency_penalty=0.0,
    presence_penalty=0.0, stop_token_ids=None, ignore_eos=False, min_new_tokens=0, logits_processor=None, n=1,
    speculate=None,
)  # fmt: skip


def takes_options(options: type) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a public method that takes `**options: Unpack[options]`, where `options` is a TypedDict of names in `DEFAULTS`.

    The method's signature then shows each of these names. Other names raise TypeError, as in any function of Python. Errors
    about input have a short traceback.
    """

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(method)
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        shared = [
            inspect.Parameter(name, keyword, default=DEFAULTS[name], annotation=hint)
            for name, hint in get_type_hints(options).items()
        ]
        names = {each.name for each in (*own, *shared)}

        @functools.wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs.keys() - names:
                raise TypeError(f"{method.__qualname__}() got an unexpected keyword argument {name!r}")
            return method(*args, **kwargs)

        checked.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
        return short_traceback(checked)

    return decorate


def twin_of(method: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Decorate the async twin of a public method: give it the method's parameters, for `help` and for type checkers.

    Errors about input have a short traceback.
    """

    def decorate(twin: Callable[..., T]) -> Callable[P, T]:
        checked, returned = short_traceback(twin), inspect.signature(twin).return_annotation
        checked.__signature__ = inspect.signature(method).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return checked

    return decorate


@dataclass(frozen=True)
class PromptOptions:
    """The options of the answers to one prompt, checked."""

    sampling: SamplingParams
    stop: tuple[str, ...]
    max_gen_len: int | None
    min_new_tokens: int
    seed: int | None
    logits_processor: LogitsProcessor | None

    def seed_of_answer(self, index: int) -> int | None:
        """Return the seed of one of the answers: the seed of the prompt plus the answer's index, as a signed 64-bit integer."""
        return None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63


class CallOptions:
    """The options of a call as its caller gives them. The methods check those that they return. None means a default."""

    def __init__(self, temperature: Any = None, top_p: Any = None, max_gen_len: Any = None, stop: Any = (), **options: Any):
        """options: any of `AnswerOptions`."""
        self.given = {"temperature": temperature, "top_p": top_p, **options}
        self.max_gen_len, self.stop = max_gen_len, stop

    def n_answers(self) -> int:
        """Return the number of answers to each prompt."""
        if (n := self.given.get("n")) is not None:
            check_count(n, "n")
        return 1 if n is None else int(n)

    def speculate(self) -> str | None:
        """Return what guesses tokens: "prompt" or "draft"; "" for nothing, None for the model's default."""
        value = self.given.get("speculate")
        if value is not None and value is not False and value not in ("prompt", "draft"):
            raise InputError(f"speculate is {describe(value)}; it must be 'prompt', 'draft', or False")
        return "" if value is False else value

    def ignores_eos(self) -> bool:
        """Return True if EOS does not end an answer."""
        check_flag(ignored := self.given.get("ignore_eos"), "ignore_eos")
        return bool(ignored)

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an answer besides EOS."""
        given = self.given.get("stop_token_ids")
        tokens = to_list(() if given is None else given, "stop_token_ids", "a list of tokens, as in [token]")
        for token in tokens:
            if not is_integer(token) or int(token) < 0:
                raise InputError(f"stop_token_ids: {describe(token)} is no token; tokens are whole numbers, 0 or more")
        return tuple(map(int, tokens))

    def check_tokens(self, n_words: int) -> None:
        """Raise InputError if an option names a token that a tokenizer of n_words tokens does not have."""
        sampling = SamplingParams(logit_bias=self.given.get("logit_bias"))
        check_bias_tokens(sampling.logit_bias, n_words)
        if (largest := max(self.stop_token_ids, default=0)) >= n_words:
            raise InputError(f"stop_token_ids: {largest} is no token; tokens are whole numbers from 0 to {n_words - 1}")

    def of_prompts(self, n_prompts: int) -> list[PromptOptions]:
        """Return the options of each prompt. Raise InputError for a wrong value, or a wrong number of values."""
        limits = _lengths(self.max_gen_len, "max_gen_len", n_prompts)
        least = [length or 0 for length in _lengths(self.given.get("min_new_tokens"), "min_new_tokens", n_prompts)]
        for limit, minimum in zip(limits, least, strict=True):
            if limit is not None and minimum > limit:
                raise InputError(f"min_new_tokens is {minimum}, more than max_gen_len={limit}; change one of them")
        others = self._seeds(n_prompts), self._processors(n_prompts)
        columns = zip(self._sampling(n_prompts), self._stops(n_prompts), limits, least, *others, strict=True)
        return [PromptOptions(*row) for row in columns]

    def check(self) -> None:
        """Raise InputError for what is wrong with the options of a call with one prompt, without a tokenizer."""
        self.n_answers(), self.ignores_eos(), self.speculate(), self.stop_token_ids, self.of_prompts(1)

    def _sampling(self, n_prompts: int) -> list[SamplingParams]:
        given = {field.name: self.given[field.name] for field in fields(SamplingParams) if field.name in self.given}
        lists = {name: one_for_each(value, name, n_prompts) for name, value in given.items() if is_list(value)}
        if not lists:
            return [SamplingParams(**given)] * n_prompts
        return [SamplingParams(**given | {name: each[i] for name, each in lists.items()}) for i in range(n_prompts)]

    def _stops(self, n_prompts: int) -> list[tuple[str, ...]]:
        """Return the stop strings of each prompt. Only a list that contains a list has some for each prompt."""
        if is_list(self.stop) and any(isinstance(each, (list, tuple)) for each in self.stop):
            return [check_stop(each) for each in one_for_each(self.stop, "stop", n_prompts)]
        return [check_stop(self.stop)] * n_prompts

    def _seeds(self, n_prompts: int) -> list[int | None]:
        """Return the seed of each prompt, as a signed 64-bit integer; all are None without seeds."""
        seed = self.given.get("seed")
        if seed is None:
            return [None] * n_prompts
        if is_list(seed):
            seed = to_list(seed, "seed", "a whole number, or one for each prompt")
        for value in seed if is_list(seed) else [seed]:
            if not is_integer(value) or not -(2**63) <= int(value) < 2**64:
                raise InputError(
                    f"seed is {describe(value)}; it must be a whole number from -2**63 to 2**64 - 1, or one for each prompt"
                )
        return [(int(value) + 2**63) % 2**64 - 2**63 for value in one_for_each(seed, "seed", n_prompts)]

    def _processors(self, n_prompts: int) -> list[LogitsProcessor | None]:
        given = self.given.get("logits_processor")
        processors = [given] * n_prompts if callable(given) else one_for_each(given, "logits_processor", n_prompts)
        for processor in processors or [given] * (not is_list(given)):  # also without prompts
            if processor is not None and not callable(processor):
                raise InputError(
                    f"logits_processor is {describe(processor)}; it must be a function (tokens, logits) -> logits, or a list "
                    "with one for each prompt"
                )
        return processors


@short_traceback
def validate_options(
    max_gen_len: int | None = None,
    stop: str | Sequence[str] | None = (),
    seed: int | None = None,
    **options: Any,
) -> None:
    """Check options without a model: raise InputError if a call would reject them. options: those of `text_completion`.

    None means the default of each option.
    """
    if unknown := options.keys() - {"temperature", "top_p", *DEFAULTS}:
        raise TypeError(f"validate_options() got an unexpected keyword argument {min(unknown)!r}")
    CallOptions(max_gen_len=max_gen_len, stop=stop, seed=seed, **options).check()


def is_list(value: Any) -> bool:
    """Return True for a list, tuple, generator, array or tensor."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, Mapping, Set))


def to_list(values: Iterable[Any], name: str, expected: str) -> list[Any]:
    """Return the items of a list, tuple, generator, array or tensor. Raise InputError for anything else.

    name: name of the argument in the error. expected: description of a valid value, also for the error.
    """
    if is_list(values):
        items = values.tolist() if hasattr(values, "tolist") else list(values)
        if isinstance(items, list):  # tolist() of a 0-dimensional array or tensor returns a single value
            return items
    raise InputError(f"{name} is {describe(values)}; it must be {expected}")


def one_for_each(value: Any, name: str, n_prompts: int) -> list[Any]:
    """Return a value for each prompt: those of a list with one for each prompt, or the same for all. name: for the error."""
    if not is_list(value) or getattr(value, "ndim", 1) == 0:
        return [value] * n_prompts
    values = to_list(value, name, "a value, or one for each prompt")
    if len(values) != n_prompts:
        prompts = f"{n_prompts} prompt{'s' * (n_prompts != 1)}"
        raise InputError(f"{name} has {len(values)} values for {prompts}; give one value, or one for each prompt")
    return values


def _lengths(value: Any, name: str, n_prompts: int) -> list[int | None]:
    """Return a number of tokens for each prompt, or None. Raise InputError unless each is a whole number, 0 or more."""
    lengths = one_for_each(value, name, n_prompts)
    for length in lengths if is_list(value) else [value]:  # also without prompts
        if length is not None and not (is_integer(length) and int(length) >= 0):
            raise InputError(f"{name} is {describe(length)}; it must be a whole number, 0 or more")
    return [None if length is None else int(length) for length in lengths]
