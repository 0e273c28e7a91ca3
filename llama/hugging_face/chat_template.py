"""The chat format of a model with a chat template, which is rendered by Jinja's sandbox.

A rendered dialog is a text in which special tokens, such as "<|im_end|>", stand for control tokens. They count only where the
template wrote them. So they are replaced in the template's own texts by marks, single letters that occur nowhere in the dialog,
before it is rendered. What a message contains stays text.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..chat import Dialog, check_messages, continues_answer
from ..checkpoint.hugging_face_settings import AddedToken
from ..errors import InputError
from ..tokenizer import Tokenizer
from .template_process import TemplateProcess
from .tokenizer import HuggingFaceTokenizer

FIRST_MARK, LAST_MARK = "\U00100000", "\U0010fffd"  # 65,534 letters of Unicode that are for private use


class TemplateFormat:
    """A chat format that a template describes."""

    tags: Sequence[str] = ()  # no text is refused, since the special tokens of a text have no effect

    def __init__(self, template: str, path: Path, roles: dict[str, str]) -> None:
        """path: the file of the template. roles: the texts of the tokens that templates know as bos_token, eos_token, ..."""
        self.template, self.path, self.roles = template, path, roles
        self.name = f"the template of {path}"
        self.process = TemplateProcess()

    def check(self, dialog: Dialog, name: str, continue_answer: bool | None = False) -> None:
        """Raise InputError unless a dialog is a list of messages that is to be answered. The template checks the roles."""
        check_messages(dialog, name)
        if not dialog:
            raise InputError(f"{name} is empty; it must end with a 'user' message")
        if dialog[-1]["role"] == "assistant" and not continue_answer:
            raise InputError(
                f"{name} ends with 'assistant'; the last message must be by 'user', to be answered, "
                "unless continue_answer=True has this message continued"
            )

    def encode(self, tokenizer: Tokenizer, dialog: Dialog, name: str = "the dialog") -> list[int]:
        """Return the tokens of a dialog that `check` has accepted. Raise InputError for one that the template refuses."""
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise InputError(
                f"the chat template of {self.path} needs the tokenizer of its folder; build without tokenizer_path"
            )
        try:
            parts = self._render(tokenizer, [{"role": m["role"], "content": m["content"]} for m in dialog])
        except InputError as e:
            raise InputError(f"{name}: {e}") from None
        return tokenizer.encode_parts(parts)

    def _render(self, tokenizer: HuggingFaceTokenizer, messages: list[dict[str, str]]) -> list[str | AddedToken]:
        """Return the parts of the rendered dialog: texts, and special tokens."""
        special = tokenizer.special_finder
        unused = _unused_letters([self.template, *(t.text for t in special.tokens), *(m["content"] for m in messages)])
        marks = {next(unused): token for token in special.tokens}
        end = next(unused) + " "  # where an answer that has begun ends; as in transformers, the template may trim the blank
        continues = continues_answer(messages)  # type: ignore[arg-type]
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            messages += [last | {"content": last["content"] + end}] * continues
        text = self._text(messages, marks, continues, end)
        if not special.starts(text):
            return list(_split_at_marks(text, marks))
        # Either messages contain special tokens, or the template forms them of parts, as in "<|" + role + "|>". Render again
        # with other letters in place of the messages' own: then only those that the template forms are still there.
        hidden: dict[str, Any] = {
            letter: next(unused) for letter in sorted(set("".join(token.text.strip() for token in special.tokens)))
        }
        messages = [m | {"content": m["content"].translate(str.maketrans(hidden))} for m in messages]
        text_without = self._text(messages, marks, continues, end)
        if not special.starts(text_without):
            return list(_split_at_marks(text, marks))
        shown = str.maketrans({other: letter for letter, other in hidden.items()})
        marked = [special.split(p) if isinstance(p, str) else [p] for p in _split_at_marks(text_without, marks)]
        return [part.translate(shown) if isinstance(part, str) else part for parts in marked for part in parts]

    def _text(self, messages: list[dict[str, str]], marks: dict[str, AddedToken], continues: bool, end: str) -> str:
        """Return the rendered dialog, up to `end` if it continues an answer. Special tokens of the template are marks."""
        mark_of = {token.text: mark for mark, token in marks.items()}
        roles = {role: mark_of.get(text, text) for role, text in self.roles.items()}
        variables: dict[str, Any] = {**roles, "messages": messages, "tools": None, "documents": None}
        variables["add_generation_prompt"] = not continues
        text = self.process.render(self.template, [[text, mark] for text, mark in mark_of.items()], variables, self.path)
        if not continues:
            return text
        before, found, after = text.rpartition(end[0])
        if not found:
            raise InputError("the model's chat template leaves out the answer that is to be continued; leave it out, too")
        return before if after.startswith(end[1]) else before.rstrip()


def _unused_letters(texts: list[str]) -> Iterator[str]:
    """Yield letters for private use that none of the texts contains."""
    used = {letter for text in texts for letter in text if letter >= FIRST_MARK}
    yield from (letter for letter in map(chr, range(ord(FIRST_MARK), ord(LAST_MARK) + 1)) if letter not in used)
    raise InputError("the messages contain tens of thousands of letters for private use, and none is left; shorten them")


def _split_at_marks(text: str, marks: dict[str, AddedToken]) -> Iterator[str | AddedToken]:
    """Yield the parts of a rendered dialog: texts, and the special tokens of marks."""
    for part in re.split(f"([{FIRST_MARK}-{LAST_MARK}])", text):
        if part in marks:
            yield marks[part]
        elif part:
            yield part
