"""A conversation in the chat: keep the dialog, fit it into the context, and run commands such as /retry.

The input is lines of the user. The output is chunks of answers, and status lines for the function `print_status`. Nothing in
this module depends on a terminal.
"""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from ..chat import SPECIAL_TAGS, UNSAFE_ERROR, Message, encode_dialog, is_unsafe
from ..distributed.agreement import run_on_rank0
from ..errors import InputError
from ..generation import Llama
from ..tokenizer import check_text

COMMANDS_HELP = """/system TEXT  set the system text; without TEXT, show it; with -, remove it
/clear        clear the conversation, but keep the system text
/retry        answer the last question again
/save FILE    write the conversation to a new file, as JSON
/help         show this list
/exit         leave the chat, as Ctrl-D does
Ctrl-C ends an answer; the part already shown is kept."""


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
        **sampling: Any,
    ) -> None:
        self.llama, self.print_status = llama, print_status
        self.system = check_message("system", system) if system else None
        self.exchanges: list[tuple[str, str]] = []  # pairs of question and answer, oldest first
        self.done = False  # True after the command /exit
        self.cut_off: str | None = None  # why the last answer was cut off; None if it was not
        self.context_length = llama.model.params.max_seq_len
        self.max_gen_len = max_gen_len
        # Special tags end an answer, because the next call would refuse a dialog that contains a special tag.
        self.stream_options = dict(max_gen_len=max_gen_len, stop=(*stop, *SPECIAL_TAGS), reuse=True, **sampling)

    def dialog(self) -> list[Message]:
        """Return the conversation so far as a list of messages, in the form that `chat_completion` takes."""
        return self._dialog(self.exchanges)

    def _dialog(self, exchanges: list[tuple[str, str]], question: str | None = None) -> list[Message]:
        """Return a list of messages: the system text, the exchanges, and the question if there is one."""
        dialog: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for user, answer in exchanges:
            dialog += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return dialog if question is None else [*dialog, {"role": "user", "content": question}]

    def respond(self, line: str) -> Generator[str, None, None] | None:
        """Return the answer to a question or to /retry, as a generator of text chunks; None for all other lines.

        Raises InputError for a line that cannot be answered. The conversation then stays unchanged.
        """
        name, _, text = line.strip().partition(" ")
        if name.startswith("/"):
            return self._run_command(name, text.strip())
        return self._answer(self._truncate_to_context(check_message("user", line), self.exchanges)) if name else None

    def _run_command(self, name: str, text: str) -> Generator[str, None, None] | None:
        """Run a command. For /retry, return a new answer to the last question; for all other commands, return None."""
        if name == "/retry":
            if not self.exchanges:
                raise InputError("there is no question to answer again")
            *earlier, (question, _) = self.exchanges
            return self._answer(self._truncate_to_context(question, earlier))
        if name == "/system":
            self._set_system(text)
        elif name == "/clear":
            self.exchanges.clear()
            self.print_status("the conversation is cleared")
        elif name == "/save":
            self.print_status(run_on_rank0(lambda: self._save(text)))
        elif name == "/help":
            self.print_status(COMMANDS_HELP)
        elif name == "/exit":
            self.done = True
        else:
            raise InputError(f"{name} is not a command; /help lists all commands")
        return None

    def _set_system(self, text: str) -> None:
        """Set the system text to `text`, or remove it if `text` is "-"; change nothing if `text` is empty. Print the status."""
        if text == "-":
            self.system = None
        elif text:
            self.system = check_message("system", text)
        status = "there is no system text" if self.system is None else f"the system text is: {self.system}"
        hint = "; the conversation continues, /clear clears it" if text and self.exchanges else ""
        self.print_status(status + hint)

    def _save(self, name: str) -> str:
        """Write the conversation to a new file. Return a status line that reports success, or the reason of a failure."""
        if not name or not self.exchanges:
            return "give a file name, as in /save talk.json" if not name else "the conversation is empty: nothing to save"
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as f:
                json.dump(self.dialog(), f, ensure_ascii=False, indent=1)
        except FileExistsError:
            return f"{name} exists already; give another name"
        except (OSError, RuntimeError, ValueError) as e:  # no permission, unknown ~user, invalid name
            return f"{name} cannot be written: {getattr(e, 'strerror', None) or e}"
        return f"saved in {name}"

    def _answer(self, dialog: list[Message]) -> Generator[str, None, None]:
        """Yield the answer to a dialog in chunks. When the answer ends or is ended early, add it to the conversation."""
        stream = self.llama.chat_completion_stream(dialog, **self.stream_options)
        answer, self.cut_off = "", None
        try:
            for chunk in stream:
                answer += chunk
                yield chunk
        finally:
            stream.close()
            self.exchanges.append((dialog[-1]["content"], answer))
        if stream.finish_reason == "length":
            full = stream.prompt_tokens + stream.new_tokens >= self.context_length
            self.cut_off = f"the context of {self.context_length} tokens is full" if full else f"max_gen_len={self.max_gen_len}"

    def _truncate_to_context(self, question: str, earlier: list[tuple[str, str]]) -> list[Message]:
        """Return a dialog of earlier exchanges and a question. Forget the oldest exchanges if the context is too short.

        A quarter of the context, or max_gen_len tokens if that is less, is reserved for the answer. Raises InputError if the
        question alone is too long.
        """
        reserved = self.context_length // 4 if self.max_gen_len is None else min(self.context_length // 4, self.max_gen_len)
        for dropped in range(len(earlier) + 1):
            dialog = self._dialog(earlier[dropped:], question)
            n_tokens = len(encode_dialog(self.llama.tokenizer, dialog))
            if n_tokens + reserved <= self.context_length:
                break
        else:
            raise InputError(
                f"the question has {n_tokens} tokens, with the system text, and {reserved} more are reserved for the answer, "
                f"but the context has only {self.context_length}: shorten the question, or start with a larger --max_seq_len"
            )
        self.exchanges = earlier[dropped:]
        if dropped:
            forgotten = "oldest exchange is" if dropped == 1 else f"{dropped} oldest exchanges are"
            self.print_status(f"the context of {self.context_length} tokens is full: the {forgotten} forgotten")
        return dialog


def check_message(role: str, text: str) -> str:
    """Return the text of a message. Raise InputError if it contains a special tag, or if UTF-8 cannot encode it."""
    check_text(text, f"the {role} text")
    if is_unsafe([{"role": "user", "content": text}]):
        raise InputError(UNSAFE_ERROR)
    return text
