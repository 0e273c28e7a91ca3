"""What calls return."""

from dataclasses import dataclass, field
from typing import TypedDict

from ..chat import Message
from .requests import FinishReason, Request


class ResultDetails(TypedDict, total=False):
    """What `logprobs=True` and `details=True` add to a result."""

    tokens: list[str]  # with logprobs=True, each token decoded by itself
    logprobs: list[float]  # with logprobs=True
    finish_reason: FinishReason | None  # with details=True, like the rest
    prompt_tokens: int
    new_tokens: int


class CompletionPrediction(ResultDetails, total=False):
    generation: str


class InfillingPrediction(ResultDetails, total=False):
    generation: str
    full_text: str


class ChatPrediction(ResultDetails, total=False):
    generation: Message


@dataclass(frozen=True)
class Score:
    """The tokens of a continuation, each decoded by itself, and their log probabilities."""

    tokens: list[str]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """Log probability of the whole continuation."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """Mean log probability per token, which compares continuations of different lengths."""
        return self.total / len(self.logprobs)


@dataclass
class GenerationResult:
    """The answer to one request: tokens, their log probabilities if asked for, and text if wanted."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""

    def details(self) -> ResultDetails:
        """Return what `details=True` adds to a result."""
        request = self.request
        return ResultDetails(
            finish_reason=request.finish_reason, prompt_tokens=len(request.prompt), new_tokens=request.num_new_tokens
        )
