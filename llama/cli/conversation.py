"""A conversation: what was said, what of it fits into the window, and the commands.

Lines come in, pieces of the answer go out, remarks go to `print_status`. Nothing here knows about keyboards or screens.
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
/clear        forget the conversation, but keep the system text
/retry        answer the last question again
/save FILE    write the conversation to a new file, as JSON
/help         this
/exit         leave, as Ctrl-D does
Ctrl-C ends an answer; the part already shown is kept."""


class Conversation:
    """A dialog that grows by what is asked and answered.

    An answer counts as far as it was taken, also when it is ended early. When the window is full the oldest exchange is
    forgotten, never the system text. On several ranks each holds the same conversation.
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
        self.exchanges: list[tuple[str, str]] = []
        self.done = False  # /exit was said
        self.cut_off: str | None = None  # what ended the last answer, if it was not the model
        self.window = llama.model.params.max_seq_len
        self.max_gen_len = max_gen_len
        # The tags also end an answer: they are the format's, and would have the next dialog refused.
        self.stream_options = dict(max_gen_len=max_gen_len, stop=(*stop, *SPECIAL_TAGS), reuse=True, **sampling)

    def dialog(self) -> list[Message]:
        """What was said, as `chat_completion` takes it once a question follows."""
        return self._dialog(self.exchanges)

    def _dialog(self, exchanges: list[tuple[str, str]], *question: str) -> list[Message]:
        dialog: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for user, answer in exchanges:
            dialog += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        return dialog + [{"role": "user", "content": text} for text in question]

    def respond(self, line: str) -> Generator[str, None, None] | None:
        """The answer to a line, piece by piece; None where there is none, as to most commands.

        Raises InputError for a line that cannot be answered, which changes nothing.
        """
        name, _, text = line.strip().partition(" ")
        if name.startswith("/"):
            return self._run_command(name, text.strip())
        return self._answer(self._truncate_to_context(check_message("user", line), self.exchanges)) if name else None

    def _run_command(self, name: str, text: str) -> Generator[str, None, None] | None:
        if name == "/retry":
            if not self.exchanges:
                raise InputError("nothing was asked yet")
            *earlier, (question, _) = self.exchanges
            return self._answer(self._truncate_to_context(question, earlier))
        if name == "/system":
            self._set_system(text)
        elif name == "/clear":
            self.exchanges.clear()
            self.print_status("the conversation begins anew")
        elif name == "/save":
            self.print_status(run_on_rank0(lambda: self._save(text)))
        elif name == "/help":
            self.print_status(COMMANDS_HELP)
        elif name == "/exit":
            self.done = True
        else:
            raise InputError(f"{name} is no command; /help names them")
        return None

    def _set_system(self, text: str) -> None:
        if text == "-":
            self.system = None
        elif text:
            self.system = check_message("system", text)
        shown = "there is no system text" if self.system is None else f"the system text is: {self.system}"
        goes_on = "; the conversation goes on, /clear begins anew" if text and self.exchanges else ""
        self.print_status(shown + goes_on)

    def _save(self, name: str) -> str:
        if not name or not self.exchanges:
            return "give a name, as in /save talk.json" if not name else "nothing was said yet"
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as f:
                json.dump(self.dialog(), f, ensure_ascii=False, indent=1)
        except FileExistsError:
            return f"{name} is there already; give another name"
        except (OSError, RuntimeError, ValueError) as e:  # nowhere to write; ~ of nobody; a name that no file has
            return f"{name} cannot be written: {getattr(e, 'strerror', None) or e}"
        return f"saved in {name}"

    def _answer(self, dialog: list[Message]) -> Generator[str, None, None]:
        stream = self.llama.chat_completion_stream(dialog, **self.stream_options)
        answer, self.cut_off = "", None
        try:
            for piece in stream:
                answer += piece
                yield piece
        finally:
            stream.close()
            self.exchanges.append((dialog[-1]["content"], answer))
        if stream.finish_reason == "length":
            full = stream.prompt_tokens + stream.new_tokens >= self.window
            self.cut_off = f"the window of {self.window} ids is full" if full else f"max_gen_len={self.max_gen_len}"

    def _truncate_to_context(self, question: str, earlier: list[tuple[str, str]]) -> list[Message]:
        """The dialog with this question after these exchanges, less the oldest if need be: it leaves a quarter of the
        window, or max_gen_len, to the answer."""
        room = min(self.window // 4, self.window if self.max_gen_len is None else self.max_gen_len)
        for dropped in range(len(earlier) + 1):
            dialog = self._dialog(earlier[dropped:], question)
            n_ids = len(encode_dialog(self.llama.tokenizer, dialog))
            if n_ids + room <= self.window:
                break
        else:
            raise InputError(
                f"the question has {n_ids} ids, the system text included, but the window of {self.window} ids must hold an "
                f"answer of {room} too: shorten it, or start with a larger --max_seq_len"
            )
        self.exchanges = earlier[dropped:]
        if dropped:
            forgotten = "oldest exchange is" if dropped == 1 else f"{dropped} oldest exchanges are"
            self.print_status(f"the window of {self.window} ids is full: the {forgotten} forgotten")
        return dialog


def check_message(role: str, text: str) -> str:
    """The text, if a message may be that."""
    check_text(text, f"the {role} text")
    if is_unsafe([{"role": "user", "content": text}]):
        raise InputError(UNSAFE_ERROR)
    return text
