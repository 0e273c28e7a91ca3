"""The terminal for the command line: read lines, write text, and handle Ctrl-C.

Only rank 0 reads and writes. While an answer is written, Ctrl-C sets a flag that is checked between two chunks, so that no
decode step is interrupted. At the prompt, Ctrl-C discards the typed line. There are two cases:

    the process controls its terminal   Ctrl-C arrives as SIGINT.
    torchrun controls the terminal      torchrun starts each rank in a session of its own, and SIGINT would end torchrun and all
                                        ranks. So the terminal is set to deliver Ctrl-C as a character. Ctrl-\\ still ends
                                        torchrun.
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
except ImportError:  # missing on Windows; lines are then read without editing
    readline = None  # type: ignore[assignment]

INTERRUPT = b"\x03"  # the character of Ctrl-C


def configure_stream(stream: TextIO, **options: str) -> None:
    """Set the encoding or the error handler of a standard stream. Do nothing if the stream is replaced, as in a notebook."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(**options)  # type: ignore[arg-type]


class Terminal:
    """Standard input and output of rank 0: a terminal, files or pipes. Other ranks read and write nothing."""

    def __init__(self) -> None:
        self.is_rank0 = global_rank() == 0
        self.keyboard = sys.stdin.isatty()
        self.prompt = "> " if self.keyboard and sys.stdout.isatty() else ""
        self.reading = self.interrupt_requested = self.closed = False
        self.typed_ahead: list[str] = []  # complete lines that were typed during an answer
        self.saved_termios: list[Any] | None = None  # terminal settings to restore; None if they are unchanged

    def __enter__(self) -> "Terminal":
        if not self.is_rank0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 handles Ctrl-C for all ranks
            return self
        configure_stream(sys.stdin, errors="surrogateescape")  # invalid UTF-8 is refused later, in the line that contains it
        configure_stream(sys.stdout, errors="replace")
        if self.keyboard:
            signal.signal(signal.SIGINT, self._interrupt)
            if os.name == "posix":
                self._take_over_terminal()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.saved_termios is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self.saved_termios)

    def _take_over_terminal(self) -> None:
        """If another process controls the terminal, set it to deliver Ctrl-C as a character that ends a line."""
        try:
            os.tcgetpgrp(0)
        except OSError:
            import termios

            self.saved_termios = termios.tcgetattr(0)
            settings = termios.tcgetattr(0)
            disabled = os.fpathconf(0, "PC_VDISABLE").to_bytes(1, "little")
            # Ctrl-Z is disabled too: it would stop torchrun, but not the ranks.
            settings[6][termios.VINTR] = settings[6][termios.VSUSP] = disabled
            settings[6][termios.VEOL] = INTERRUPT
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):  # sent by torchrun when it ends
                signal.signal(number, lambda number, _: sys.exit(128 + number))  # runs `__exit__`, which restores the terminal
            termios.tcsetattr(0, termios.TCSADRAIN, settings)
            if "GNU" in (getattr(readline, "__doc__", None) or ""):
                readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-m"')

    def _interrupt(self, *_: object) -> None:
        """Handle SIGINT: at the prompt, raise KeyboardInterrupt; during an answer, only record the interrupt."""
        if self.reading:
            raise KeyboardInterrupt
        self.interrupt_requested = True

    def read(self) -> str | None:
        """Return the next line of input; None at the end of the input, or if the reader of the output has closed the pipe."""
        self.interrupt_requested = False
        if self.closed:
            return None
        if self.typed_ahead:
            self.write(f"{self.prompt}{self.typed_ahead[0]}\n")
            return self.typed_ahead.pop(0)
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
        """Return True if the answer must end now: after Ctrl-C, or if the reader of the output has closed the pipe."""
        while self.saved_termios and not self.interrupt_requested and select.select([0], [], [], 0)[0]:
            text = os.read(0, 4096)  # one line, or pasted lines that are separated by carriage returns
            self.interrupt_requested = INTERRUPT in text or not text
            lines = text.decode(errors="surrogateescape").replace("\r", "\n").removesuffix("\n").split("\n")
            self.typed_ahead = [] if self.interrupt_requested else [*self.typed_ahead, *lines]  # Ctrl-C discards typed lines
        return self.interrupt_requested or self.closed

    def write(self, text: str) -> None:
        """Write text to standard output. Do nothing if the reader of the output has closed the pipe."""
        if self.closed:
            return
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does; this is not an error
            self.closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print_status(self, text: str) -> None:
        """Print a status line to stderr; standard output is only for answers."""
        if self.is_rank0:
            print(text, file=sys.stderr, flush=True)
