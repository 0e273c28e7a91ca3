"""Write answers in OpenAI's wire format: whole, or as the chunks of a stream."""

import json
from typing import Any

from .answers import Answer, Piece, TokenLogprob
from .protocol import Job


def head(job: Job, stream: bool) -> dict[str, Any]:
    """Return the fields that all parts of a response have."""
    kind = ("chat.completion.chunk" if stream else "chat.completion") if job.is_chat else "text_completion"
    return {
        "id": f"{'chatcmpl' if job.is_chat else 'cmpl'}-{job.id}",
        "object": kind,
        "created": job.created,
        "model": job.model,
    }


def usage(job: Job, answers: list[Answer]) -> dict[str, Any]:
    """Count tokens: each prompt once, and all its answers. Cached tokens of a prompt are those that no answer has computed."""
    prompt, completion = sum(map(len, job.prompts)), sum(answer.new_tokens for answer in answers)
    cached = sum(min(each.cached_tokens for each in answers[i : i + job.n]) for i in range(0, len(answers), job.n))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


class Choice:
    """The part of a response that one answer fills: its text so far, and its log probabilities."""

    def __init__(self, job: Job, answer: Answer) -> None:
        self.job, self.answer = job, answer
        self.text = ""
        self.logprobs: list[TokenLogprob] = []

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs += piece.logprobs

    def whole(self) -> dict[str, Any]:
        """Return the choice of a whole response."""
        if self.job.is_chat:
            message = {"role": "assistant", "content": self.text, "refusal": None}
            return self._choice({"message": message}, self.logprobs, self.answer.finish_reason)
        return self._choice({"text": self.text}, self.logprobs, self.answer.finish_reason)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return the choice of a stream's chunk."""
        part: dict[str, Any] = {"delta": {"content": piece.text}} if self.job.is_chat else {"text": piece.text}
        return self._choice(part, piece.logprobs, None)

    def first_chunk(self) -> dict[str, Any]:
        return self._choice({"delta": {"role": "assistant", "content": "", "refusal": None}}, [], None)

    def last_chunk(self) -> dict[str, Any]:
        part: dict[str, Any] = {"delta": {}} if self.job.is_chat else {"text": ""}
        return self._choice(part, [], self.answer.finish_reason)

    def _choice(self, part: dict[str, Any], logprobs: list[TokenLogprob], reason: str | None) -> dict[str, Any]:
        return {"index": self.answer.index, **part, "logprobs": self._logprobs(logprobs), "finish_reason": reason}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self.job.logprobs or not logprobs:
            return None
        if self.job.is_chat:
            content = [
                {"token": t.text, "logprob": t.logprob, "bytes": [*t.bytes], "top_logprobs": self._top_of_chat(t)}
                for t in logprobs
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [t.text for t in logprobs],
            "token_logprobs": [t.logprob for t in logprobs],
            "top_logprobs": [*map(self._top_of_completion, logprobs)] if self.job.top_logprobs else None,
            "text_offset": [t.offset for t in logprobs],
        }

    def _top_of_chat(self, token: TokenLogprob) -> list[dict[str, Any]]:
        return [{"token": text, "logprob": logprob, "bytes": [*value]} for (text, value), logprob in token.top]

    def _top_of_completion(self, token: TokenLogprob) -> dict[str, float] | None:
        """Return the log probabilities of the likeliest tokens by their texts, and that of the chosen one.

        Of several tokens with one text, such as a letter and its byte, the likeliest counts.
        """
        if token.logprob is None:
            return None
        by_text = dict[str, float]()
        for (text, _), logprob in (*token.top, (token[:2], token.logprob)):
            by_text.setdefault(text, logprob)
        return by_text
