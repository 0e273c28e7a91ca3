"""The requests that a call passes to the engine, and the tokens that the engine yields."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..errors import check_flag
from ..sampling import Sampler, SamplingParams, sample_top_p

FinishReason = Literal["stop", "length"]


class GeneratedToken(NamedTuple):
    """One token that the engine yields: generated for a prompt, or echoed from it."""

    prompt_index: int
    token: int
    logprob: float | None  # None if the call does not ask for log probabilities


@dataclass
class Request:
    """A prompt, the options of its answer, and the progress of the answer."""

    prompt: list[int]  # tokens of the prompt
    max_new_tokens: int
    seed: int | None = None
    label: str = "the prompt"  # name of the prompt in errors
    score_from: int | None = None  # index of the first prompt token to score, if the call has `score_only`
    num_cached_tokens: int = 0  # number of prompt tokens whose keys and values were in the cache already
    num_new_tokens: int = 0  # number of new tokens that the caller has taken, without EOS
    # None until the answer ends. The engine sets the finish reason; a consumer of tokens may set it to end the answer.
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class GenerationCall:
    """The requests of one call, and the options that all of them share. The options are validated, and equal on all ranks."""

    requests: list[Request]
    sampling: SamplingParams
    logprobs: bool | None = False
    echo: bool | None = False
    stop: Sequence[str] | None = None  # stop strings; None if the call returns tokens, not text
    details: bool | None = False
    stop_token: int | None = None  # token that ends an answer; None for EOS
    # Function that samples tokens, given probabilities (B, vocab) and top_p. Greedy sampling does not use this function.
    sampler: Sampler = field(default=sample_top_p, repr=False)
    name: str = "call"  # the caller's name for it in errors, such as "text_completion"
    watched: bool = False  # True if code of the caller runs between two tokens, and so may change the model
    score_only: bool = False  # True if the call generates nothing, and returns log probabilities of prompt tokens

    def __post_init__(self) -> None:
        for name in ("logprobs", "echo", "details"):
            check_flag(getattr(self, name), name)

    @property
    def scores_prompts(self) -> bool:
        """Return True if the call returns log probabilities of prompt tokens."""
        return self.score_only or bool(self.echo and self.logprobs)

    def score_from(self, request: Request) -> int | None:
        """Return the index of the first prompt token to score, 1 or more; None if no prompt token is scored."""
        return request.score_from if self.score_only else 1 if self.scores_prompts else None
