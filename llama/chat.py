"""Chat formats, which encode dialogs as tokens, and Llama 2's own.

    <s>[INST] <<SYS>>
    system
    <</SYS>>

    user [/INST] answer </s><s>[INST] user [/INST]

A dialog may begin with a `system` message, which becomes part of the first `user` message. After it, `user` and `assistant`
messages alternate. The last message is by `user`, or it is the beginning of an answer by `assistant`, which is to be continued:

    <s>[INST] user [/INST] beginning

hugging_face/chat_template.py has the formats of models with another template.
"""

import re
from collections.abc import Sequence
from typing import Literal, Protocol, TypedDict

from .errors import InputError, describe, short_repr
from .tokenizer import Tokenizer, check_text

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = [B_INST, E_INST, "<<SYS>>", "<</SYS>>"]
_ROLES = "roles are 'system', 'user' and 'assistant'"
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def find_tag(dialog: Dialog, tags: Sequence[str] = SPECIAL_TAGS) -> str | None:
    """Return the first of a format's own tags, such as "[INST]", that a message of the dialog contains, or None."""
    return next((tag for message in dialog for tag in tags if tag in message["content"]), None)


def is_unsafe(dialog: Dialog, tags: Sequence[str] = SPECIAL_TAGS) -> bool:
    """Return True if a message of the dialog contains one of a format's own tags."""
    return find_tag(dialog, tags) is not None


def check_dialog(dialog: Dialog, name: str, continue_answer: bool | None = False) -> None:
    """Raise InputError unless a dialog is a list of messages whose roles have the order of Llama 2's format.

    name: what the error calls the dialog. The error also gives the index of the wrong message.
    continue_answer: accept a dialog whose last message is by the assistant.
    """
    check_messages(dialog, name, _ROLES)
    for i, message in enumerate(dialog):
        if (role := message["role"]) not in ("system", "user", "assistant"):
            raise InputError(f"{name}, message {i}: its role is {describe(role)}; {_ROLES}")
    turns = [m["role"] for m in dialog]
    system = turns[:1] == ["system"]
    if not turns[system:]:
        raise InputError(f"{name} {'has only a system message' if system else 'is empty'}; it must end with a 'user' message")
    for i, role in enumerate(turns[system:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise InputError(
                f"{name}, message {i + system} is by {role!r}, but must be by {expected!r}: an optional 'system' first, then "
                f"'user' and 'assistant' in turn; {_way_out(turns, i + system)}"
            )
    if turns[-1] != "user" and not continue_answer:
        raise InputError(
            f"{name} ends with 'assistant'; the last message must be by 'user', to be answered, "
            "unless continue_answer=True has this message continued"
        )


def check_messages(dialog: Dialog, name: str, expected: str = "it must be a name, such as 'user'") -> None:
    """Raise InputError unless a dialog is a list of messages whose roles are names and whose contents are texts.

    name: what the error calls the dialog. expected: what the error says about a role that is no name.
    """
    if isinstance(dialog, (str, bytes, dict)) or not isinstance(dialog, Sequence):
        raise InputError(
            f"{name} is {describe(dialog)}; a dialog is a list of messages, {{'role': ..., 'content': ...}}"
            + ("" if name == "the dialog" else ", and here a list of dialogs is needed")
        )
    for i, message in enumerate(dialog):
        if isinstance(message, list) and message and isinstance(message[0], dict):
            raise InputError(f"{name}, message {i} is a list: give one dialog here, not a list of dialogs")
        if not isinstance(message, dict):
            raise InputError(f"{name}, message {i} is {describe(message)}; it must be a dict with 'role' and 'content'")
        for key in ("role", "content"):
            if key not in message:
                raise InputError(f"{name}, message {i} has no {key!r}; it has {short_repr([*message])}")
        check_text(message["content"], f"{name}, message {i}: its content")
        if not isinstance(role := message["role"], str) or not _ROLE.fullmatch(role):
            raise InputError(f"{name}, message {i}: its role is {describe(role)}; {expected}")


def _way_out(roles: Sequence[str], i: int) -> str:
    """Return how to mend a dialog whose message i has the wrong role."""
    if i and roles[i] == roles[i - 1]:
        return f"merge messages {i - 1} and {i}: join their contents with a blank line"
    if roles[i] == "system":
        return "merge all system messages into one, and put it first"
    return "begin with the user's question; what the assistant says before it may be part of the 'system' message"


def encode_dialog(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Return the tokens of a dialog that `check_dialog` has accepted.

    Each exchange is encoded as BOS, question, answer, EOS, and the last question as BOS, question. If the last message is the
    beginning of an answer, it follows the last question, without EOS. White space at its end is kept.
    """
    texts = [m["content"] for m in dialog]
    if dialog[0]["role"] == "system":
        texts = [B_SYS + texts[0] + E_SYS + texts[1], *texts[2:]]
    tokens: list[int] = []
    beginning = texts.pop().lstrip() if dialog[-1]["role"] == "assistant" else ""
    for user, answer in zip(texts[:-1:2], texts[1::2], strict=True):
        tokens += tokenizer.encode(f"{B_INST} {user.strip()} {E_INST} {answer.strip()} ", bos=True, eos=True)
    question = f"{B_INST} {texts[-1].strip()} {E_INST}"
    return tokens + tokenizer.encode(f"{question} {beginning}" if beginning else question, bos=True, eos=False)


def continues_answer(dialog: Dialog) -> bool:
    """Return True if a dialog ends with the beginning of an answer. One without text leaves the answer to begin anew."""
    return dialog[-1]["role"] == "assistant" and bool(dialog[-1]["content"].strip())


class ChatFormat(Protocol):
    """How a model takes dialogs. `LLAMA_2` is the format of Meta's models."""

    name: str
    tags: Sequence[str]  # texts that no message may contain

    def check(self, dialog: Dialog, name: str, continue_answer: bool | None = False) -> None:
        """Raise InputError unless the format takes the dialog; see `check_dialog`."""

    def encode(self, tokenizer: Tokenizer, dialog: Dialog, name: str = "the dialog") -> list[int]:
        """Return the tokens of a dialog that `check` has accepted. name: what an error calls the dialog."""


class Llama2Format:
    """Llama 2's chat format."""

    name = "Llama 2"
    tags: Sequence[str] = SPECIAL_TAGS

    def check(self, dialog: Dialog, name: str, continue_answer: bool | None = False) -> None:
        check_dialog(dialog, name, continue_answer)

    def encode(self, tokenizer: Tokenizer, dialog: Dialog, name: str = "the dialog") -> list[int]:
        return encode_dialog(tokenizer, dialog)


LLAMA_2: ChatFormat = Llama2Format()
