"""Read what a user sends: one message or one command, of one line or of several.

Lines come from a function that asks with a prompt, so nothing in this module depends on a terminal.
"""

from collections.abc import Callable
from dataclasses import dataclass

PROMPT, CONTINUED = "> ", "... "
QUOTES = '"""'  # begin and end a message of several lines
TAKES_BLOCK = ("", "/system", "/set system")  # a block may begin a message, or be the text of these commands


@dataclass(frozen=True)
class UserInput:
    """A text that a user has sent."""

    text: str
    may_be_command: bool = False  # False for a paste of several lines, and for quoted or piped text: always a message

    @property
    def as_typed(self) -> str:
        """Return this input as a history entry that can be sent again; "" for a command of several lines."""
        if "\n" in self.text:
            return "" if self.may_be_command and self.text.startswith("/") else self.text
        return self.text if self.may_be_command else f"{QUOTES}{self.text}{QUOTES}"


def read_input(read_line: Callable[[str], str | None]) -> UserInput | None:
    """Return the next message or command that is typed; None at the end of the input.

    read_line: shows a prompt, and returns a line without its newline, or None at the end of the input. A text that was pasted
    is one line with newlines in it, and is one message.
    A line that begins with three quotes begins a block, which ends with a line that ends with them. A line that ends with a
    backslash continues on the next. At the end of the input, an unfinished message is discarded.
    """
    line = read_line(PROMPT)
    if line is None:
        return None
    line = line.strip("\n")
    if "\n" in line:
        pasted = line.strip()
        quoted = pasted.startswith(QUOTES) and pasted.endswith(QUOTES) and pasted.count(QUOTES) == 2
        return UserInput(pasted.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n") if quoted else line)
    command, quotes, block = line.partition(QUOTES)
    if quotes and command.strip() in TAKES_BLOCK:
        while not block.rstrip().endswith(QUOTES):
            if (line := read_line(CONTINUED)) is None:
                return None
            block += "\n" + line
        block = block.rstrip().removesuffix(QUOTES).strip("\n")
        return UserInput(f"{command.strip()} {block}", may_be_command=True) if command.strip() else UserInput(block)
    text = line
    while text.endswith("\\"):
        text = text[:-1]
        if (line := read_line(CONTINUED)) is None:
            return None
        text += "\n" + line
    return UserInput(text, may_be_command=True)
