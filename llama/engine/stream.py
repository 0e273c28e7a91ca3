"""Streams: the text of an answer in chunks, while the answer is generated."""

import contextlib
import inspect
from collections.abc import Generator, Iterator
from types import TracebackType

from ..errors import short_traceback
from .incremental_text import IncrementalText
from .requests import FinishReason, GeneratedToken, Request


class Stream:
    """Iterate over the text of an answer in chunks, while it is generated. The joined chunks are the text of the whole answer.

    A stream shares the batch with all other calls. It may be left early: `close`, or the end of a `with` block, frees its
    resources. If several ranks share a model, or the model is modified, another call ends the stream: its next chunk raises
    InputError. All ranks must read the same number of chunks.
    """

    def __init__(self, request: Request, chunks: Generator[str, None, None]) -> None:
        self._request = request
        self._chunks = chunks

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return "stop" after EOS or a stop string, "length" at max_gen_len or the context length, None while running."""
        return self._request.finish_reason

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens in the prompt."""
        return len(self._request.prompt)

    @property
    def new_tokens(self) -> int:
        """Return the number of tokens generated so far, without EOS."""
        return self._request.num_new_tokens

    def __iter__(self) -> "Stream":
        return self

    @short_traceback
    def __next__(self) -> str:
        return next(self._chunks)

    def __repr__(self) -> str:
        is_closed = inspect.getgeneratorstate(self._chunks) == inspect.GEN_CLOSED
        state = self.finish_reason or ("ended early" if is_closed else "running")
        return f"<Stream {state}: {self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens>"

    def close(self) -> None:
        """End the stream, and free its resources."""
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
    if chunk := text.end():
        yield chunk


def push_token(request: Request, text: IncrementalText, token: GeneratedToken) -> str:
    """Add a token to the text of an answer. Return the text that can be released now. A stop string ends the answer."""
    chunk = text.push(token.token)
    if text.stopped:
        request.finish_reason = "stop"
    return chunk
