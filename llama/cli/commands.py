"""The commands of the chat, such as /retry: one table, from which /help and the completion at Tab are made.

Files are read and written on rank 0 only; the outcome is the same on all ranks.
"""

import contextlib
import difflib
import glob
import json
import os
import textwrap
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..chat import ChatFormat, check_dialog
from ..distributed.agreement import run_on_rank0
from ..errors import InputError, describe
from .conversation import Conversation, check_message
from .user_input import UserInput

T = TypeVar("T")
Answer = Generator[str, None, None]

MAX_FILE_BYTES = 10_000_000  # of a file to read; far more than any context holds
NO_VALUE = "none"  # the value of an option that is not set
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help", "exit": "/exit", "quit": "/exit"}


@dataclass(frozen=True)
class Command:
    """A command: what it takes, as /help shows it, its help, and a function that runs it and may return an answer."""

    argument: str
    help: str
    run: Callable[[Conversation, str], Answer | None]


def respond(conversation: Conversation, entry: UserInput) -> Answer | None:
    """Return the answer to a message, /retry or /read, as a generator of text chunks; None for all other commands.

    Raises InputError for an input that cannot be obeyed or answered. The conversation then stays unchanged.
    """
    if not entry.text.strip():
        return None
    name, text = parse(entry)
    if name is None:
        return conversation.ask(text)
    if text and not COMMANDS[name].argument:
        raise InputError(f"{name} takes nothing after it; to send this line as a message, begin it with //")
    return COMMANDS[name].run(conversation, text)


def parse(entry: UserInput) -> tuple[str | None, str]:
    """Return the name of a command and its argument; for a message, None and the message.

    Raises InputError for a word that looks like a mistyped command.
    """
    text = entry.text.strip()
    word, *rest = text.split(maxsplit=1)
    name = ALIASES.get(word, word)
    if not entry.may_be_command or not name.startswith("/") or (not word.startswith("/") and rest):
        return None, entry.text
    if word.startswith("//"):
        return None, entry.text.replace("//", "/", 1)
    if name in COMMANDS:
        return name, "".join(rest)
    known = [*COMMANDS, *(alias for alias in ALIASES if alias.startswith("/"))]
    close = [known_name for known_name in known if known_name.startswith(word.lower()) and len(word) > 1]
    if close := close or difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.8):
        raise InputError(f"{word} is not a command; did you mean {close[0]}? To send this line as a message, begin it with //")
    return None, entry.text


def complete(text: str) -> list[str] | None:
    """Return what the text before the cursor may become at Tab: commands, or files after a command; None for a message."""
    name, blank, start = text.partition(" ")
    if not name.startswith("/"):
        return None
    if not blank:
        return [f"{command} " if COMMANDS[command].argument else command for command in COMMANDS if command.startswith(name)]
    if name not in COMMANDS or "FILE" not in COMMANDS[name].argument:
        return []
    paths = sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*"))
    return [f"{name} {path}{'/' if os.path.isdir(path) else ''}" for path in paths]


def help_text() -> str:
    """Return a list of all commands, and what else can be typed."""
    table = {f"{name} {command.argument}".rstrip(): command.help for name, command in COMMANDS.items()} | {
        "//TEXT": "send /TEXT as a message",
        '"""': 'begin a message of several lines, which ends with """; a \\ at the end of a line continues it, too',
    }
    width = max(map(len, table)) + 2
    rows = [
        textwrap.fill(f"{name:<{width}}{text}", 110, subsequent_indent=" " * width, break_on_hyphens=False)
        for name, text in table.items()
    ]
    return "\n".join([*rows, "Ctrl-C ends an answer; the part already shown is kept."])


def _system(conversation: Conversation, text: str) -> None:
    """Set the system text to `text`, or remove it if `text` is "-"; change nothing if `text` is empty. Print the status."""
    if text:
        conversation.system = None if text == "-" else check_message("system", text, conversation.chat_format)
    system = conversation.system
    status = "there is no system text" if system is None else f"the system text is: {system}"
    hint = "; the conversation continues, /clear clears it" if text and conversation.exchanges else ""
    conversation.print_status(status + hint)


def _clear(conversation: Conversation, _: str) -> None:
    conversation.exchanges.clear()
    conversation.print_status("the conversation is cleared")


def _set(conversation: Conversation, text: str) -> None:
    """Set an option, given its name and value. Without a value show it, and without a name show all options."""
    name, *values = text.replace("=", " ", 1).split(maxsplit=1)[:2] or [""]
    name, value = name.replace("-", "_"), "".join(values)
    shown: dict[str, Any] = conversation.options | {
        "verbose": "on" if conversation.verbose else "off",
        "system": conversation.system,
    }
    if name and name not in shown:
        raise InputError(f"{name} is not an option; the options are {', '.join(shown)}")
    if not value:
        lines = [f"{n:<20}{NO_VALUE if v is None else v}" for n, v in shown.items() if name in ("", n)]
        return conversation.print_status("\n".join(lines))
    if name == "system":
        return _system(conversation, "-" if value == NO_VALUE else value)
    if name == "verbose":
        if value not in ("on", "off"):
            raise InputError(f"verbose is {describe(value)}; it must be on or off")
        conversation.verbose = value == "on"
    else:
        conversation.set_option(name, None if value == NO_VALUE and name in ("max_gen_len", "seed") else _number(value))
    conversation.print_status(f"{name} is {value}")


def _number(text: str) -> int | float | str:
    """Return a text as a number; if it is none, as it is."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _save(conversation: Conversation, name: str) -> None:
    """Write the conversation to a new file."""
    path = _file_name(name, "/save talk.json")
    if not conversation.exchanges:
        raise InputError("the conversation is empty: nothing to save")

    def write() -> None:
        text = json.dumps(conversation.dialog(), ensure_ascii=False, indent=1)
        with Path(path).expanduser().open("x", encoding="utf-8") as f:
            f.write(text)

    _on_rank0(write, f"{path} cannot be written")
    conversation.print_status(f"saved in {path}")


def _load(conversation: Conversation, name: str) -> None:
    """Replace the conversation by one that /save has written."""
    path = _file_name(name, "/load talk.json")
    dialog = _on_rank0(lambda: _parse_dialog(_read_text(path), path, conversation.chat_format), f"{path} cannot be read")
    has_system = dialog[0]["role"] == "system"
    texts = [message["content"] for message in dialog[has_system:]]
    conversation.system = dialog[0]["content"] if has_system else None
    conversation.exchanges = list(zip(texts[::2], texts[1::2], strict=True))
    count = f"{len(conversation.exchanges)} exchange{'s' if len(conversation.exchanges) > 1 else ''}"
    conversation.print_status(f"loaded from {path}: {count}, {'and a' if has_system else 'without a'} system text")


def _parse_dialog(text: str, name: str, chat_format: ChatFormat) -> list[dict[str, str]]:
    """Return the messages that a file holds as JSON. Raises InputError unless they are exchanges, as /save writes them."""
    try:
        dialog = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{name} is not JSON ({e}); give a file that /save has written") from e
    if not isinstance(dialog, list) or not dialog:
        raise InputError(f"{name} holds {describe(dialog)}; it must be a list of messages, as /save writes it")
    last = dialog[-1]
    if isinstance(last, dict) and last.get("role") in ("user", "system"):
        raise InputError(f"{name} ends with a {last['role']!r} message; it must end with an answer, as /save writes it")
    check_dialog([*dialog, {"role": "user", "content": ""}], name)
    for message in dialog:
        check_message(message["role"], message["content"], chat_format)
    return dialog


def _read(conversation: Conversation, text: str) -> Answer:
    """Ask with the content of a file, and with the question after its name, if there is one."""

    def message() -> str:
        name, question = _split_file_name(text)
        content = _read_text(name).strip("\n")
        if not content.strip():
            raise InputError(f"{name} contains no text; give another file")
        return f"{content}\n\n{question}" if question else content

    _file_name(text, "/read notes.txt, or /read notes.txt What is this about?")
    return conversation.ask(_on_rank0(message, f"{text} cannot be read"))


def _split_file_name(text: str) -> tuple[str, str]:
    """Return a file's name and the text after it. A name with blanks is quoted, or the whole text."""
    if text[0] in "\"'" and text[0] in text[1:]:
        name, _, question = text[1:].partition(text[0])
    elif Path(text).expanduser().is_file():
        name, question = text, ""
    else:
        name, *rest = text.split(maxsplit=1)
        question = "".join(rest)
    return name, question.strip()


def _file_name(text: str, example: str) -> str:
    """Return the name of a file without the quotes around it. Raises InputError if it is empty."""
    name = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    if not name:
        raise InputError(f"give a file name, as in {example}")
    return name


def _read_text(name: str) -> str:
    """Return the text of a file. Raises InputError if it is no text in UTF-8, or too large."""
    path = Path(name).expanduser()
    if path.exists() and not path.is_file():  # a named pipe would wait until a program writes to it
        raise InputError(f"{name} is a folder or a device, not a file")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise InputError(f"{name} has {size:,} bytes, and a file may have {MAX_FILE_BYTES:,}; give a shorter file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{name} is not text in UTF-8 (byte {e.start:,} is {e.object[e.start]:#x}); convert it") from e


def _on_rank0(work: Callable[[], T], failed: str) -> T:
    """Run work on a file on rank 0 only, and return its result. If it fails, raise InputError with the reason on all ranks.

    failed: the beginning of the message if the operating system reports an error; its reason follows.
    """

    def with_reason() -> T:
        try:
            return work()
        except InputError:
            raise
        except FileExistsError as e:
            raise InputError(f"{e.filename} exists already; give another name") from e
        except (OSError, RuntimeError, ValueError) as e:  # no permission, unknown ~user, invalid name
            raise InputError(f"{failed}: {getattr(e, 'strerror', None) or e}") from e

    return run_on_rank0(with_reason)


def _exit(conversation: Conversation, _: str) -> None:
    conversation.done = True


COMMANDS = {
    "/system": Command("TEXT", "set the system text; without TEXT, show it; with -, remove it", _system),
    "/set": Command("NAME VALUE", "set an option, such as temperature 0.3; alone, show all options", _set),
    "/clear": Command("", "clear the conversation, but keep the system text", _clear),
    "/retry": Command("", "answer the last question again", lambda conversation, _: conversation.retry()),
    "/read": Command("FILE QUESTION", "send the text of a file, and a question about it if there is one", _read),
    "/save": Command("FILE", "write the conversation to a new file, as JSON", _save),
    "/load": Command("FILE", "continue a conversation that /save has written", _load),
    "/help": Command("", "show this list; so does /?", lambda conversation, _: conversation.print_status(help_text())),
    "/exit": Command("", "leave the chat, as Ctrl-D, /quit, /bye, exit and quit do", _exit),
}
