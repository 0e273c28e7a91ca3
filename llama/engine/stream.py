"""Streams: the text of an answer in chunks, while the answer is generated."""

import contextlib
import inspect
from collections.abc import Generator, Iterator
from types import TracebackType

from ..errors import InputError, short_traceback
from ..tokenizer import Tokenizer
from .incremental_text import IncrementalText
from .requests import FinishReason, GeneratedToken, GenerationCall, Request


@contextlib.contextmanager
def _one_reader() -> Iterator[None]:
    """Raise InputError in place of Python's error for a generator that another thread is running."""
    try:
        yield
    except ValueError as e:
        if str(e) != "generator already executing":
            raise
        raise InputError("another thread is reading this stream; give each thread a stream of its own") from None


class AnswerProgress:
    """What a stream tells about its answer. `_request` is its request, `_text` the chunks that have been read, joined."""

    _request: Request
    _text: str

    @property
    def text(self) -> str:
        """Return the text that has been read so far: all chunks, joined."""
        return self._text

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return "stop" after EOS or a stop string, "length" at max_gen_len or the context length, None while running."""
        return self._request.finish_reason

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens in the prompt."""
        return len(self._request.prompt)

    @property
    def cached_tokens(self) -> int:
        """Return how many prompt tokens were in the KV cache already and were not computed; 0 before the first chunk."""
        return self._request.num_cached_tokens

    @property
    def guessed_tokens(self) -> int:
        """Return how many guesses of the answer's tokens have been computed so far; 0 without `speculate`."""
        return self._request.num_guessed_tokens

    @property
    def accepted_tokens(self) -> int:
        """Return how many of the guesses were right."""
        return self._request.num_accepted_tokens

    @property
    def new_tokens(self) -> int:
        """Return the number of tokens whose text has been read so far, without EOS."""
        return self._request.num_new_tokens


class Stream(AnswerProgress):
    """Iterate over the text of an answer in chunks, while it is generated. The joined chunks are the text of the whole answer.

    The stream keeps a row of the batch until it ends; `close`, or the end of a `with` block, ends it early. If the model is
    changed, it raises InputError after the chunks that were already generated. On several ranks without `lead`, and for a
    modified model, another call ends it, too. All ranks that make the call must read the same number of chunks. One thread at a
    time may read or close a stream.
    """

    def __init__(self, request: Request, chunks: Generator[str, None, None]) -> None:
        self._request, self._chunks, self._text = request, chunks, ""

    def __iter__(self) -> "Stream":
        return self

    @short_traceback
    def __next__(self) -> str:
        with _one_reader():
            chunk = next(self._chunks)
            self._text += chunk
            return chunk

    def __repr__(self) -> str:
        is_closed = inspect.getgeneratorstate(self._chunks) == inspect.GEN_CLOSED
        state = self.finish_reason or ("ended early" if is_closed else "running")
        return f"<Stream {state}: {self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens>"

    def close(self) -> None:
        """End the stream, and free its row of the batch."""
        with _one_reader():
            self._chunks.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def text_chunks(request: Request, tokens: Iterator[GeneratedToken], text: IncrementalText) -> Generator[str, None, None]:
    """Yield the text of an answer in chunks: the text of each token at once. A stop string ends the answer."""
    with contextlib.closing(tokens):  # type: ignore[type-var]
        for token in tokens:
            if chunk := push_token(request, text, token):
                yield chunk
    if chunk := end_text(request, text):
        yield chunk


class StopStrings:
    """End each answer of a call with the token that completes a stop string, while a caller reads the tokens."""

    def __init__(self, call: GenerationCall, tokenizer: Tokenizer) -> None:
        self.requests = call.requests
        self.texts = [IncrementalText.of_answer(call, request, tokenizer) for request in call.requests]

    def check(self, token: GeneratedToken) -> GeneratedToken:
        """Return a token that the engine has yielded, after ending its answer if it completes a stop string."""
        request = self.requests[token.prompt_index]
        if request.num_new_tokens:  # not for echoed tokens of the prompt
            push_token(request, self.texts[token.prompt_index], token)
        return token


def tokens_until_stop(
    call: GenerationCall, tokens: Iterator[GeneratedToken], tokenizer: Tokenizer
) -> Generator[GeneratedToken, None, None]:
    """Yield the tokens of a call. A stop string ends an answer."""
    stops = StopStrings(call, tokenizer)
    with contextlib.closing(tokens):  # type: ignore[type-var]
        for token in tokens:
            yield stops.check(token)


def end_text(request: Request, text: IncrementalText) -> str:
    """End the text of an answer. Return the text that has been held back; it may complete a stop string."""
    chunk = text.end()
    if text.stopped:
        request.finish_reason = "stop"
    return chunk


def push_token(request: Request, text: IncrementalText, token: GeneratedToken) -> str:
    """Add a token to the text of an answer. Return the text that can be released now. A stop string ends the answer."""
    chunk = text.push(token.token)
    if text.stopped:
        request.finish_reason = "stop"
    return chunk
