"""Generate the answers of a job: their texts in pieces, with log probabilities, from the model's async streams of tokens."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple, Protocol

from ..chat import UNSAFE_ERROR
from ..engine.async_calls import AsyncTokens
from ..engine.incremental_text import IncrementalText
from ..engine.requests import FinishReason, GeneratedToken
from ..tokenizer import Tokenizer, make_detokenizer
from .metrics import Metrics
from .protocol import Job


class Model(Protocol):
    """What the server needs of a `Llama`."""

    tokenizer: Any
    chat_format: Any
    model: Any

    def agenerate_stream(self, prompt_tokens: Any, max_gen_len: int | None, *args: Any, **options: Any) -> AsyncTokens: ...


LEAST_LOGPROB = -9999.0  # what OpenAI's format has for a token without any probability; JSON has no infinity


class TokenText(NamedTuple):
    """The text of a token by itself. The bytes of all tokens of a choice, joined, are its text."""

    text: str
    bytes: bytes


class TokenLogprob(NamedTuple):
    """A token with its log probability, None for the first of a prompt, and the likeliest tokens at its position."""

    text: str
    bytes: bytes
    logprob: float | None
    top: list[tuple[TokenText, float]]  # likeliest first
    offset: int  # where it begins in the text of the choice, in characters


class Piece(NamedTuple):
    """A part of an answer: its text, and its tokens if the job asks for log probabilities."""

    text: str
    logprobs: list[TokenLogprob]


class TokenTexts:
    """Give the text of each token of a row by itself. The space before the first one is left out, as `decode` does."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        """prompt: the tokens before the first one, whose text is not part of the choice."""
        self.tokenizer, self.detokenizer, self.offset = tokenizer, make_detokenizer(tokenizer), 0
        self.started = bool(prompt and self.detokenizer.begin(prompt))

    def push(self, token: GeneratedToken) -> TokenLogprob:
        """Add a token to the row. Return it with its text, and the texts of the likeliest tokens in its place."""
        top = [(self.text_of(other), max(logprob, LEAST_LOGPROB)) for other, logprob in token.top_logprobs or []]
        text, value = self.text_of(token.token)
        before = self.offset
        self.offset += len(self.detokenizer.push(token.token))
        self.started = self.started or not self.tokenizer.is_control(token.token)
        offset = self.offset - len(text) if text.encode() == value else before  # one of several bytes of a character
        logprob = None if token.logprob is None else max(token.logprob, LEAST_LOGPROB)
        return TokenLogprob(text, value, logprob, top, offset)

    def text_of(self, token: int) -> TokenText:
        """Return the text of a token as the next one of the row. A control token, such as EOS, has none."""
        value = self.tokenizer.token_bytes(token, first=not self.started)
        try:
            return TokenText(value.decode(), value)
        except UnicodeDecodeError:
            return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in value), value)


class Answer:
    """One answer of a job. `pieces` generates it; closing that frees its row of the batch."""

    def __init__(self, llama: Model, job: Job, index: int, metrics: Metrics) -> None:
        self.job, self.index, self.metrics, self.tokenizer = job, index, metrics, llama.tokenizer
        self.prompt = job.prompts[index // job.n]
        self.limit = min(job.max_tokens, llama.model.params.max_seq_len - len(self.prompt))
        self.new_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.ended = self.prompt_counted = False
        self.created = time.monotonic()
        eos_ids = () if job.ignore_eos else (self.tokenizer.eos_id, *self.tokenizer.more_eos_ids)
        self.end_tokens = {*eos_ids, *job.stop_token_ids}
        options = job.options(index, self.limit)
        self.tokens = llama.agenerate_stream([self.prompt], self.limit, **options) if self.prompt else None
        metrics.in_flight += 1  # last: an answer that could not be made is never ended

    @property
    def cached_tokens(self) -> int:
        """Return how many tokens of the prompt were in the KV cache already; 0 before the first token."""
        return sum(self.tokens.cached_tokens) if self.tokens else 0

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the answer in pieces. An answer of a chat that begins anew is a text of its own; others continue the prompt."""
        if self.tokens is None:
            self.finish_reason = "stop"
            yield Piece(UNSAFE_ERROR, [])
            return
        text = IncrementalText(self.tokenizer, self.job.stop)
        prompt_text = text.begin(self.prompt) if self.job.continues_prompt else ""
        texts = TokenTexts(self.tokenizer, self.prompt if self.job.continues_prompt and not self.job.echo else [])
        prompt_logprobs: list[TokenLogprob] = []
        first = last = 0.0  # times of the first and the last new token
        async with contextlib.aclosing(self.tokens):
            n_echoed = 0
            async for token in self.tokens:
                self._count_prompt()
                if self.job.echo and n_echoed < len(self.prompt):
                    n_echoed += 1
                    if self.job.logprobs:
                        scored = texts.push(token)
                        prompt_logprobs.append(scored if n_echoed > 1 else scored._replace(logprob=None))
                    if n_echoed == len(self.prompt):
                        yield Piece(prompt_text, prompt_logprobs)
                    continue
                if token.token in self.end_tokens:
                    yield Piece("", [texts.push(token)])
                    break
                if not self.new_tokens:
                    first = time.monotonic()
                    self.metrics.begin_answer(first - self.created)
                self.new_tokens += 1
                last = time.monotonic()
                self.metrics.completion_tokens += 1
                chunk = text.push(token.token)
                logprobs = [texts.push(token)] if self.job.logprobs else []
                if chunk or logprobs:
                    yield Piece(chunk, logprobs)
                if text.stopped:
                    self.finish_reason = "stop"
                    break
        self._count_prompt()
        if chunk := text.end():
            yield Piece(chunk, [])
        if text.stopped:
            self.finish_reason = "stop"
        if self.finish_reason is None:
            self.finish_reason = "length" if self.new_tokens == self.limit else "stop"
        if self.new_tokens > 1:
            self.metrics.seconds_per_token.observe((last - first) / (self.new_tokens - 1))

    def _count_prompt(self) -> None:
        """Count the tokens of the prompt once, with the first of its answers, as `usage` does."""
        if not self.prompt_counted and self.index % self.job.n == 0:
            self.metrics.prompt_tokens += len(self.prompt)
        self.prompt_counted = True

    def end(self) -> None:
        """Count the answer as ended; a second time has no effect."""
        if not self.ended:
            self.ended = True
            self.metrics.in_flight -= 1
            self.metrics.running -= self.new_tokens > 0
            if self.tokens:
                self.metrics.guessed_tokens += sum(self.tokens.guessed_tokens)
                self.metrics.accepted_tokens += sum(self.tokens.accepted_tokens)


async def merged(answers: list[Answer]) -> AsyncGenerator[tuple[Answer, Piece | None], None]:
    """Yield the pieces of all answers as they come, and None at the end of each answer."""
    queue: asyncio.Queue[tuple[Answer, Piece | BaseException | None]] = asyncio.Queue()

    async def pump(answer: Answer) -> None:
        try:
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    queue.put_nowait((answer, piece))
            queue.put_nowait((answer, None))
        except Exception as e:
            queue.put_nowait((answer, e))
        finally:
            answer.end()

    tasks = [asyncio.create_task(pump(answer)) for answer in answers]
    try:
        unfinished = len(answers)
        while unfinished:
            answer, piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            unfinished -= piece is None
            yield answer, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
