"""The types of the results that calls return."""

from dataclasses import dataclass, field
from typing import TypedDict

from ..chat import Message
from .requests import FinishReason, Request, TopTokens


class ResultDetails(TypedDict, total=False):
    """The entries that `logprobs=True` and `details=True` add to a result."""

    tokens: list[str]  # with logprobs=True: the text of each token, decoded separately
    logprobs: list[float]  # with logprobs=True: log probability of each token
    # with top_logprobs=n: for each token, the n likeliest tokens at its position as (text, log probability), likeliest first
    top_logprobs: list[list[tuple[str, float]]]
    # The following three entries are present with details=True.
    finish_reason: FinishReason | None
    prompt_tokens: int
    new_tokens: int
    # The following two are present with details=True if the call speculates.
    guessed_tokens: int
    accepted_tokens: int


class CompletionPrediction(ResultDetails, total=False):
    generation: str


class InfillingPrediction(ResultDetails, total=False):
    generation: str
    full_text: str


class ChatPrediction(ResultDetails, total=False):
    generation: Message


@dataclass(frozen=True)
class Score:
    """The tokens of a continuation, each decoded to text separately, and their log probabilities.

    greedy: for each token, True if greedy sampling would choose it. top_logprobs: for each token, the likeliest tokens at its
    position with their log probabilities, if the call asks for them.
    """

    tokens: list[str]
    logprobs: list[float]
    greedy: list[bool]
    top_logprobs: list[list[tuple[str, float]]] | None = None

    @property
    def is_greedy(self) -> bool:
        """Return True if greedy sampling would generate the whole continuation."""
        return all(self.greedy)

    @property
    def total(self) -> float:
        """Return the log probability of the whole continuation."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """Return the mean log probability per token, to compare continuations of different lengths."""
        return self.total / len(self.logprobs)


@dataclass
class GenerationResult:
    """The answer to one request: tokens, and, depending on the options of the call, log probabilities and text."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopTokens] = field(default_factory=list)
    text: str = ""
    speculates: bool = False  # True if tokens were guessed

    def details(self) -> ResultDetails:
        """Return the entries that `details=True` adds to a result."""
        request = self.request
        details = ResultDetails(
            finish_reason=request.finish_reason, prompt_tokens=len(request.prompt), new_tokens=request.num_new_tokens
        )
        if self.speculates:
            details["guessed_tokens"] = request.num_guessed_tokens
            details["accepted_tokens"] = request.num_accepted_tokens
        return details
