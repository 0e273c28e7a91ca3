"""A conversation in the chat: keep the dialog and the options of its answers, and fit the dialog into the context.

The input is questions. The output is chunks of answers, and status lines for the function `print_status`. Nothing in this
module depends on a terminal.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import asdict
from typing import Any

from .. import SamplingParams, Stream, validate_options
from ..chat import LLAMA_2, UNSAFE_ERROR, ChatFormat, Message, is_unsafe
from ..distributed.agreement import run_on_rank0
from ..errors import InputError
from ..generation import Llama
from ..tokenizer import check_text


class Conversation:
    """A dialog that grows by an exchange, a question with its answer, in each turn.

    If the user ends an answer early, the chunks so far are kept. If the context is full, the oldest exchanges are forgotten,
    but never the system text. On several ranks, each rank has the same conversation.
    """

    def __init__(
        self,
        llama: Llama,
        print_status: Callable[[str], None],
        system: str | None = None,
        max_gen_len: int | None = None,
        stop: tuple[str, ...] = (),
        verbose: bool = False,
        **sampling: Any,
    ) -> None:
        self.llama, self.print_status = llama, print_status
        self.chat_format = llama.chat_format
        self.system = check_message("system", system, self.chat_format) if system else None
        self.exchanges: list[tuple[str, str]] = []  # pairs of question and answer, oldest first
        self.done = False  # True after the command /exit
        self.cut_off: str | None = None  # why the last answer was cut off; None if it was not
        self.speed: str | None = None  # the speed of the last answer; None if it has no text
        self.context_length = llama.model.params.max_seq_len
        self.verbose = verbose  # True to print the speed of each answer
        # Special tags end an answer, because the next call would refuse a dialog that contains a special tag.
        self.stop = (*stop, *self.chat_format.tags)
        # The options that `set_option` changes. Without a seed, the generator that `Llama.build` has seeded is used.
        self.options: dict[str, Any] = {**asdict(SamplingParams(**sampling)), "max_gen_len": max_gen_len, "seed": None}
        del self.options["logit_bias"]  # a mapping, which cannot be typed

    def dialog(self) -> list[Message]:
        """Return the conversation so far as a list of messages, in the form that `chat_completion` takes."""
        return self._dialog(self.exchanges)

    def _dialog(self, exchanges: list[tuple[str, str]], question: str | None = None) -> list[Message]:
        """Return a list of messages: the system text, the exchanges, and the question if there is one."""
        dialog: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for user, answer in exchanges:
            dialog += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return dialog if question is None else [*dialog, {"role": "user", "content": question}]

    def ask(self, question: str) -> Generator[str, None, None]:
        """Return the answer to a question, as a generator of text chunks.

        Raises InputError for a question that cannot be answered. The conversation then stays unchanged.
        """
        return self._answer(self._truncate_to_context(check_message("user", question, self.chat_format), self.exchanges))

    def retry(self) -> Generator[str, None, None]:
        """Return a new answer to the last question, as a generator of text chunks. It replaces the answer before."""
        if not self.exchanges:
            raise InputError("there is no question to answer again")
        *earlier, (question, _) = self.exchanges
        return self._answer(self._truncate_to_context(question, earlier))

    def set_option(self, name: str, value: Any) -> None:
        """Change an option of the next answers. Raises InputError for an invalid value, and then changes nothing."""
        changed = self.options | {name: value}
        validate_options(**changed)
        self.options = changed

    def _answer(self, dialog: list[Message]) -> Generator[str, None, None]:
        """Yield the answer to a dialog in chunks. When the answer ends or is ended early, add it to the conversation."""
        stream = self.llama.chat_completion_stream(dialog, stop=self.stop, **self.options)
        answer, self.cut_off, self.speed = "", None, None
        max_gen_len, began = self.options["max_gen_len"], time.perf_counter()
        first: tuple[float, int] | None = None  # when the first chunk was there, and after how many tokens
        try:
            for chunk in stream:
                first = first or (time.perf_counter(), stream.new_tokens)
                answer += chunk
                yield chunk
        finally:
            stream.close()
            self.exchanges.append((dialog[-1]["content"], answer))
            if first:
                self.speed = describe_speed(stream, first[0] - began, time.perf_counter() - first[0], first[1])
        if stream.finish_reason == "length":
            full = stream.prompt_tokens + stream.new_tokens >= self.context_length
            self.cut_off = f"the context of {self.context_length} tokens is full" if full else f"max_gen_len={max_gen_len}"

    def _truncate_to_context(self, question: str, earlier: list[tuple[str, str]]) -> list[Message]:
        """Return a dialog of earlier exchanges and a question. Forget the oldest exchanges if the context is too short.

        A quarter of the context, or max_gen_len tokens if that is less, is reserved for the answer. Raises InputError if the
        question alone is too long.
        """
        max_gen_len = self.options["max_gen_len"]
        reserved = self.context_length // 4 if max_gen_len is None else min(self.context_length // 4, max_gen_len)

        def number_to_forget() -> int:
            for dropped in range(len(earlier) + 1):
                n_tokens = len(self.chat_format.encode(self.llama.tokenizer, self._dialog(earlier[dropped:], question)))
                if n_tokens + reserved <= self.context_length:
                    return dropped
            raise InputError(
                f"the question has {n_tokens} tokens, with the system text, and {reserved} more are reserved for the answer, "
                f"but the context has only {self.context_length}: shorten the question, or start with a larger --max_seq_len"
            )

        dropped = run_on_rank0(number_to_forget)  # a template may give each rank another number of tokens
        dialog = self._dialog(earlier[dropped:], question)
        self.exchanges = earlier[dropped:]
        if dropped:
            forgotten = "oldest exchange is" if dropped == 1 else f"{dropped} oldest exchanges are"
            self.print_status(f"the context of {self.context_length} tokens is full: the {forgotten} forgotten")
        return dialog


def check_message(role: str, text: str, chat_format: ChatFormat = LLAMA_2) -> str:
    """Return the text of a message. Raise InputError if it contains a tag of the format, or if UTF-8 cannot encode it."""
    check_text(text, f"the {role} text")
    if is_unsafe([{"role": "user", "content": text}], chat_format.tags):
        raise InputError(UNSAFE_ERROR)
    return text


def describe_speed(stream: Stream, prefill_seconds: float, decode_seconds: float, first_tokens: int) -> str:
    """Return the numbers of tokens of an answer, and its speed, as a status line.

    prefill_seconds: the time to the first chunk of text, which has first_tokens tokens. decode_seconds: the time after it.
    """
    computed, decoded = stream.prompt_tokens - stream.cached_tokens, stream.new_tokens - first_tokens
    speed = f"{decoded / decode_seconds:.1f} tokens/s" if decoded and decode_seconds else "too short to measure"
    return (
        f"prompt: {stream.prompt_tokens} tokens, {stream.cached_tokens} of them in the cache; first text after "
        f"{prefill_seconds:.2f} s, {computed / prefill_seconds:.1f} tokens/s; answer: {stream.new_tokens} tokens, {speed}"
    )
