"""What a call asks of the engine, and the tokens that come back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..errors import check_flag
from ..sampling import Sampler, SamplingParams, sample_top_p

FinishReason = Literal["stop", "length"]


class GeneratedToken(NamedTuple):
    """One token of the answer to one prompt."""

    prompt_index: int
    token: int
    logprob: float | None  # None unless log probabilities were asked for


@dataclass
class Request:
    """One prompt with its limits, and how far its answer has come."""

    prompt: list[int]  # tokens
    max_new_tokens: int
    seed: int | None = None
    label: str = "the prompt"  # what errors call it
    num_new_tokens: int = 0  # without EOS
    finish_reason: FinishReason | None = None  # set by the engine, or by the consumer of the tokens to end the answer


@dataclass(frozen=True)
class GenerationCall:
    """The requests of one call and the options they share, validated: the same on every rank."""

    requests: list[Request]
    sampling: SamplingParams
    logprobs: bool = False
    echo: bool = False
    stop: Sequence[str] | None = None  # stop strings; None: only tokens are wanted, no text
    reuse: bool = False
    details: bool = False
    stop_token: int | None = None  # ends an answer; None stands for EOS until the call runs
    sampler: Sampler = field(
        default=sample_top_p, repr=False
    )  # chooses from probabilities (B, vocab) and top_p, unless sampling is greedy
    watched: bool = False  # the caller's code runs between two tokens, and may change the model

    def __post_init__(self) -> None:
        for name in ("logprobs", "echo", "reuse", "details"):
            check_flag(getattr(self, name), name)

    @property
    def scores_prompts(self) -> bool:
        """True if the prompts' own tokens are returned with log probabilities, which must be computed."""
        return self.echo and self.logprobs
