"""An answer as a stream of text."""

import contextlib
from collections.abc import Generator, Iterator
from types import TracebackType

from .incremental_text import IncrementalText
from .requests import FinishReason, GeneratedToken, Request


class Stream:
    """Iterate over an answer's text in chunks, as it is generated. Joined, they are the text that the batch call returns.

    The stream owns the model's cache until it ends: after another call in between, the next chunk raises InputError. A stream
    may be left early; `close`, or leaving a `with` block, frees what it holds at once. Ranks that share a model must all read
    on, or all stop after the same chunk.
    """

    def __init__(self, request: Request, chunks: Generator[str, None, None]) -> None:
        self._request = request
        self._chunks = chunks

    @property
    def finish_reason(self) -> FinishReason | None:
        """ "stop" after EOS or a stop string, "length" at max_gen_len or the end of the context; None before the end."""
        return self._request.finish_reason

    @property
    def prompt_tokens(self) -> int:
        """Number of the prompt's tokens."""
        return len(self._request.prompt)

    @property
    def new_tokens(self) -> int:
        """Number of tokens generated so far, without EOS."""
        return self._request.num_new_tokens

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        return next(self._chunks)

    def __repr__(self) -> str:
        state = self.finish_reason or "running"
        return f"<Stream {state}: {self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens>"

    def close(self) -> None:
        """End the stream, and free what it holds."""
        self._chunks.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def text_chunks(request: Request, tokens: Iterator[GeneratedToken], text: IncrementalText) -> Generator[str, None, None]:
    """Yield text as soon as it can no longer change. A stop string ends the request."""
    with contextlib.closing(tokens):  # type: ignore[type-var]
        for token in tokens:
            chunk = text.push(token.token)
            if text.stopped:
                request.finish_reason = "stop"
            if chunk:
                yield chunk
    if chunk := text.end():
        yield chunk
