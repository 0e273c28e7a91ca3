"""The requests that a call passes to the engine, and the tokens that the engine yields."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from ..errors import InputError, check_flag, describe, is_integer
from ..sampling import Sampler, SamplingParams, sample_top_p
from .logits_processors import LogitsProcessor

FinishReason = Literal["stop", "length"]
TopTokens = list[tuple[int, float]]  # the likeliest tokens at a position with their log probabilities, likeliest first
MAX_TOP_LOGPROBS = 20


def check_top_logprobs(value: int | None) -> int:
    """Return how many of the likeliest tokens a call asks for; None means 0. Raise InputError for an invalid number."""
    n_top = 0 if value is None else value
    if not is_integer(n_top) or not 0 <= int(n_top) <= MAX_TOP_LOGPROBS:
        raise InputError(f"top_logprobs is {describe(n_top)}; it must be a whole number, from 0 (off) to {MAX_TOP_LOGPROBS}")
    return int(n_top)


class TokenScore(NamedTuple):
    """The log probability of a token, and the likeliest tokens at its position; None for what a call does not ask for."""

    logprob: float | None = None
    top: TopTokens | None = None
    is_greedy: bool | None = None  # True if greedy sampling would choose the token; for tokens of prompts only

    def with_top(self, n: int) -> "TokenScore":
        """Return the score with only the n likeliest tokens, or without any."""
        return self._replace(top=self.top[:n] if n and self.top else None)


def token_score(values: list[list[Any]], i: int, n_top: int) -> TokenScore:
    """Return the score of token i. values: what `ranked_logprobs` has returned, as lists, for n_top tokens or more."""
    logprobs, *top = values
    return TokenScore(logprobs[i], [*zip(top[1][i][:n_top], top[0][i][:n_top], strict=True)] if n_top else None)


class _GeneratedToken(NamedTuple):
    prompt_index: int
    token: int
    logprob: float | None  # None if the call does not ask for log probabilities


class GeneratedToken(_GeneratedToken):
    """One token that the engine yields: generated for a prompt, or echoed from it.

    It is a tuple (prompt_index, token, logprob). `top_logprobs` is an attribute besides, so that the tuple has always three
    items: the likeliest tokens at its position, or None if the call does not ask for them.
    """

    top_logprobs: TopTokens | None = None
    is_greedy: bool | None = None  # as in TokenScore

    def __new__(
        cls, prompt_index: int, token: int, logprob: float | None, top: TopTokens | None = None, is_greedy: bool | None = None
    ) -> Any:
        self = super().__new__(cls, prompt_index, token, logprob)
        if top is not None:
            self.top_logprobs = top
        if is_greedy is not None:
            self.is_greedy = is_greedy
        return self


@dataclass
class Request:
    """A prompt, the options of its answer, and the progress of the answer."""

    prompt: list[int]  # tokens of the prompt
    max_new_tokens: int
    seed: int | None = None
    label: str = "the prompt"  # name of the prompt in errors
    continues_prompt: bool = False  # True if the answer's text keeps the space at its start, so that it continues the prompt's
    # Options that the requests of a call may have of their own. `GenerationCall` replaces None by those of the call.
    sampling: SamplingParams = None  # type: ignore[assignment]
    stop: Sequence[str] = None  # type: ignore[assignment]
    min_new_tokens: int = 0  # before this number of new tokens, no token that ends an answer is sampled
    logits_processor: LogitsProcessor | None = field(default=None, repr=False)  # its repr may differ between ranks
    # If the call has `score_only`: index of the first prompt token to score, and the token after the prompt, scored as well.
    score_from: int | None = None
    next_token: int | None = None
    num_cached_tokens: int = 0  # number of prompt tokens whose keys and values were in the cache already
    num_guessed_tokens: int = 0  # number of guesses that decode steps have computed
    num_accepted_tokens: int = 0  # number of these guesses that were right
    num_new_tokens: int = 0  # number of new tokens that the caller has taken, without EOS
    # None until the answer ends. The engine sets the finish reason; a consumer of tokens may set it to end the answer.
    finish_reason: FinishReason | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers of tokens that were cached, guessed, and guessed right, as the scheduler counts them."""
        return self.num_cached_tokens, self.num_guessed_tokens, self.num_accepted_tokens

    @counts.setter
    def counts(self, counts: tuple[int, int, int]) -> None:
        self.num_cached_tokens, self.num_guessed_tokens, self.num_accepted_tokens = counts


@dataclass(frozen=True)
class GenerationCall:
    """The requests of one call, and the options that all of them share. The options are validated, and equal on all ranks."""

    requests: list[Request]
    sampling: SamplingParams = field(default_factory=SamplingParams)  # of requests that have none of their own
    logprobs: bool | None = False
    echo: bool | None = False
    # Stop strings of requests that have none of their own; None if the call returns tokens, not text.
    stop: Sequence[str] | None = None
    details: bool | None = False
    stop_token: int | None = None  # token that ends an answer; None for EOS
    more_eos_ids: tuple[int, ...] = ()  # tokens that end an answer besides EOS, by the model's own settings
    stop_token_ids: tuple[int, ...] = ()  # further tokens that end an answer
    ignore_eos: bool = False  # True if only `stop_token_ids` end an answer
    # Function that samples tokens, given probabilities (B, vocab) and top_p. Greedy sampling does not use this function.
    sampler: Sampler = field(default=sample_top_p, repr=False)
    top_logprobs: int | None = 0  # how many of the likeliest tokens to return for each token
    include_eos: bool | None = False  # also yield the token that ends an answer
    name: str = "call"  # the caller's name for it in errors, such as "text_completion"
    watched: bool = False  # True if code of the caller runs between two tokens, and so may change the model
    score_only: bool = False  # True if the call generates nothing, and returns log probabilities of prompt tokens
    speculate: str = ""  # what guesses the next tokens: "prompt" or "draft"; "" for nothing

    def __post_init__(self) -> None:
        for name in ("logprobs", "echo", "details", "include_eos"):
            check_flag(getattr(self, name), name)
        n_top = check_top_logprobs(self.top_logprobs)
        if n_top and not self.logprobs:
            raise InputError(f"top_logprobs={n_top} is for logprobs=True; give both, or leave top_logprobs out")
        object.__setattr__(self, "top_logprobs", n_top)
        for request in self.requests:
            request.sampling = request.sampling or self.sampling
            request.stop = (self.stop or ()) if request.stop is None else request.stop

    @property
    def has_stops(self) -> bool:
        """Return True if a stop string may end an answer."""
        return any(request.stop for request in self.requests)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Return the tokens that end an answer."""
        first = () if self.stop_token is None else (self.stop_token,)
        of_model = () if self.ignore_eos else (*first, *self.more_eos_ids)
        return frozenset((*of_model, *self.stop_token_ids))

    @property
    def scores_prompts(self) -> bool:
        """Return True if the call returns log probabilities of prompt tokens."""
        return self.score_only or bool(self.echo and self.logprobs)

    def score_from(self, request: Request) -> int | None:
        """Return the index of the first prompt token to score, 1 or more; None if no prompt token is scored."""
        return request.score_from if self.score_only else 1 if self.scores_prompts else None


@dataclass(frozen=True)
class ScoringRequest:
    """The tokens of a prompt and its continuation. The tokens from index `start` on, 1 or more, are to be scored."""

    tokens: list[int]
    start: int
    label: str  # name of the prompt in errors

    @property
    def inputs(self) -> list[int]:
        """Return the tokens that the model computes: all but the last, which nothing follows."""
        return self.tokens[:-1]

    @property
    def scored(self) -> list[int]:
        return self.tokens[self.start :]
