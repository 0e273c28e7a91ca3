"""The results that calls return: their types, and how they are made from tokens and log probabilities."""

from dataclasses import dataclass, field
from typing import TypedDict

from ..chat import UNSAFE_ERROR, Message
from ..tokenizer import Tokenizer
from .requests import FinishReason, Request, ScoringRequest, TokenScore, TopTokens


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


def decode_each(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each token, decoded separately."""
    return [tokenizer.decode([token]) for token in tokens]


def infilling_results(
    prefixes: list[str], suffixes: list[str], tokens: list[list[int]], logprobs: list[list[float]] | None, tokenizer: Tokenizer
) -> list[InfillingPrediction]:
    """Return what `text_infilling` returns, from the tokens between each prefix and suffix, and their log probabilities."""
    results: list[InfillingPrediction] = []
    for i, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        text = tokenizer.decode_infilling(tokens[i])
        details: ResultDetails = {}
        if logprobs is not None:
            details = {"tokens": decode_each(tokens[i], tokenizer), "logprobs": logprobs[i]}
        results.append({"generation": text, "full_text": prefix + text + suffix, **details})
    return results


def score_result(request: ScoringRequest, scores: list[TokenScore], tokenizer: Tokenizer) -> Score:
    """Return the `Score` of a request's continuation. scores: those of its tokens."""
    top = [[(tokenizer.decode([t]), value) for t, value in each.top] for each in scores if each.top is not None]
    logprobs, greedy = [each.logprob or 0.0 for each in scores], [bool(each.is_greedy) for each in scores]
    return Score(decode_each(request.scored, tokenizer), logprobs, greedy, top or None)


@dataclass
class GenerationResult:
    """The answer to one request: tokens, and, depending on the options of the call, log probabilities and text."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopTokens] = field(default_factory=list)
    text: str = ""
    speculates: bool = False  # True if tokens were guessed

    @property
    def message(self) -> Message:
        """Return the answer to a dialog."""
        return {"role": "assistant", "content": self.text if self.request.prompt else UNSAFE_ERROR}

    def entries(
        self, tokenizer: Tokenizer, logprobs: bool | None, details: bool | None, top_logprobs: int | None
    ) -> ResultDetails:
        """Return the entries that these options of a call add to a result."""
        added: ResultDetails = {}
        if logprobs:
            added["tokens"], added["logprobs"] = decode_each(self.tokens, tokenizer), self.logprobs
        if top_logprobs:
            added["top_logprobs"] = [[(tokenizer.decode([t]), value) for t, value in top] for top in self.top_logprobs]
        return {**added, **self.details()} if details else added

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
