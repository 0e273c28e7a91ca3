"""The terminal: lines that a person types, text that they read, and Ctrl-C.

Rank 0 alone reads and is heard. Ctrl-C is a wish, asked for between two pieces of an answer, and so never stops a step
halfway; at the prompt it takes back what was typed. It reaches the program in one of two ways:

    a terminal of our own    as SIGINT
    somebody else's          as a byte. torchrun gives each rank a session of its own and keeps the terminal: the signal
                             would end torchrun, and with it every rank. So the key is taken from the terminal and
                             read like any other; Ctrl-\\ still ends torchrun.
"""

import io
import os
import select
import signal
import sys
from types import TracebackType
from typing import Any, TextIO

from ..distributed.groups import global_rank

try:
    import readline
except ImportError:  # on Windows: lines without editing
    readline = None  # type: ignore[assignment]
try:
    import readline
except ImportError:  # on Windows: lines without editing
    readline = None  # type: ignore[assignment]

INTERRUPT = b"\x03"


def configure_stream(stream: TextIO, **options: str) -> None:
    """Set how a stream is coded, unless it is somebody's own, such as a notebook's."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(**options)  # type: ignore[arg-type]


class Terminal:
    """Rank 0's standard input and output, be they a terminal, files or pipes. On other ranks nothing is read or written."""

    def __init__(self) -> None:
        self.first = global_rank() == 0
        self.keyboard = sys.stdin.isatty()
        self.prompt = "> " if self.keyboard and sys.stdout.isatty() else ""
        self.reading = self.interrupt_requested = self.closed = False
        self.typed: list[str] = []  # whole lines typed while an answer came
        self.saved_termios: list[Any] | None = None  # somebody else's terminal: how it was set before

    def __enter__(self) -> "Terminal":
        if not self.first:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 hears it for all
            return self
        configure_stream(sys.stdin, errors="surrogateescape")  # what is no text is said later, by line
        configure_stream(sys.stdout, errors="replace")
        if self.keyboard:
            signal.signal(signal.SIGINT, self._interrupt)
            if os.name == "posix":
                self._take_over_terminal()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.saved_termios is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self.saved_termios)

    def _take_over_terminal(self) -> None:
        """Have Ctrl-C come as a byte that ends a line, if the terminal is not ours."""
        try:
            os.tcgetpgrp(0)
        except OSError:
            import termios

            self.saved_termios = termios.tcgetattr(0)
            ours = termios.tcgetattr(0)
            nothing = os.fpathconf(0, "PC_VDISABLE").to_bytes(1, "little")
            ours[6][termios.VINTR] = ours[6][termios.VSUSP] = nothing  # stopped, torchrun would leave the ranks running
            ours[6][termios.VEOL] = INTERRUPT
            for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):  # from torchrun, which ends
                signal.signal(ending, lambda number, _: sys.exit(128 + number))  # by way of __exit__
            termios.tcsetattr(0, termios.TCSADRAIN, ours)
            if "GNU" in (getattr(readline, "__doc__", None) or ""):
                readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-m"')

    def _interrupt(self, *_: object) -> None:
        if self.reading:
            raise KeyboardInterrupt
        self.interrupt_requested = True

    def read(self) -> str | None:
        """The next line; None at the end of the input, or once nobody reads the output any more."""
        self.interrupt_requested = False
        if self.closed:
            return None
        if self.typed:
            self.write(f"{self.prompt}{self.typed[0]}\n")
            return self.typed.pop(0)
        try:
            self.reading = True
            return input(self.prompt)
        except EOFError:
            self.write("\n" if self.prompt else "")
            return None
        except KeyboardInterrupt:
            if not self.keyboard:
                raise
            self.write("\n")
            return ""
        finally:
            self.reading = False

    def interrupted(self) -> bool:
        """Whether the person wants the answer to end."""
        while self.saved_termios and not self.interrupt_requested and select.select([0], [], [], 0)[0]:
            text = os.read(0, 4096)  # a whole line: the terminal gathers them; or what was pasted in the prompt, by returns
            self.interrupt_requested = INTERRUPT in text or not text
            lines = text.decode(errors="surrogateescape").replace("\r", "\n").removesuffix("\n").split("\n")
            self.typed = (
                [] if self.interrupt_requested else [*self.typed, *lines]
            )  # as the signal, the key takes back what was typed
        return self.interrupt_requested or self.closed

    def write(self, text: str) -> None:
        if self.closed:
            return
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:  # nobody reads on, which is no failure
            self.closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print_status(self, text: str) -> None:
        """A remark, which is no part of the answers."""
        if self.first:
            print(text, file=sys.stderr, flush=True)
