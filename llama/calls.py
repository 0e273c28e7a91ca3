"""What goes into a call, checked, and what comes out of it."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from .chat import Message
from .engine import FinishReason, Request
from .errors import InputError, kind
from .tokenizer import Tokenizer, check_text


class Details(TypedDict, total=False):
    tokens: list[str]  # with logprobs=True
    logprobs: list[float]  # with logprobs=True
    finish_reason: FinishReason | None  # this and the rest with details=True
    prompt_tokens: int
    new_tokens: int


class CompletionPrediction(Details, total=False):
    generation: str


class ChatPrediction(Details, total=False):
    generation: Message


@dataclass(frozen=True)
class Score:
    """A continuation's ids, each decoded by itself, and their log probabilities."""

    tokens: list[str]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """The log probability of the whole."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """By id: compares continuations of different length."""
        return self.total / len(self.logprobs)


@dataclass
class Answer:
    """What has come of one request, gathered."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""


def check_texts(texts: list[str], name: str) -> None:
    """Raise InputError, with `name`, unless this is a list of texts that can be encoded."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise InputError(f"{name} is {kind(texts)}; it must be a list of texts, as in [text]")
    for row, text in enumerate(texts):
        check_text(text, f"{name.removesuffix('s')} {row}")


def check_prompts(prompts: list[list[int]], names: list[str] | None, tokenizer: Tokenizer, window: int) -> None:
    """Raise InputError, with the prompt's name, unless each is a list of the tokenizer's ids that fits into the window."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise InputError(f"prompt_tokens is {kind(prompts)}; it must be a list of lists of token ids")
    for name, prompt in zip(names or [f"prompt {row}" for row in range(len(prompts))], prompts, strict=True):
        if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
            raise InputError(f"{name} is {kind(prompt)}; it must be a list of token ids")
        if not prompt:
            raise InputError(f"{name} holds no ids; begin it with BOS ({tokenizer.bos_id})")
        for id_ in prompt:
            if isinstance(id_, bool) or not isinstance(id_, numbers.Integral) or not 0 <= int(id_) < tokenizer.n_words:
                last = tokenizer.n_words - 1
                raise InputError(f"{name}: {kind(id_)} is no token id; ids are whole numbers from 0 to {last}")
        if len(prompt) > window:
            raise InputError(
                f"{name} has {len(prompt)} ids, but the window holds max_seq_len={window}; "
                "shorten it, or build with a larger max_seq_len"
            )


def requests_of(prompts: list[list[int]], max_gen_len: int, seed: int | Sequence[int] | None, window: int) -> list[Request]:
    """Checked prompts, as the loop takes them."""
    if isinstance(max_gen_len, bool) or not isinstance(max_gen_len, numbers.Integral) or int(max_gen_len) < 0:
        raise InputError(f"max_gen_len is {kind(max_gen_len)}; it must be a whole number, 0 or more")
    seeds = seeds_of(seed, len(prompts)) or [None] * len(prompts)
    return [
        Request([int(id_) for id_ in prompt], min(int(max_gen_len), window - len(prompt)), seed)  # NumPy's are welcome
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def seeds_of(seed: int | Sequence[int] | None, rows: int) -> list[int] | None:
    """One seed for each row, within 64 bits of two's complement."""
    if seed is None:
        return None
    seeds = [seed] if isinstance(seed, (str, bytes)) or not isinstance(seed, Sequence) else list(seed)
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not -(2**63) <= int(value) < 2**64:
            raise InputError(
                f"seed is {kind(value)}; it must be a whole number from -2**63 to 2**64 - 1, or one for each prompt"
            )
    if isinstance(seed, Sequence) and len(seeds) != rows:
        raise InputError(f"{len(seeds)} seeds, but {rows} prompts; give one seed, or one for each prompt")
    signed = [(int(value) + 2**63) % 2**64 - 2**63 for value in seeds]
    return signed if isinstance(seed, Sequence) else signed * rows
