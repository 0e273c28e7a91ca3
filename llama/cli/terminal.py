"""The terminal for the command line: read what the user sends, write text, and handle Ctrl-C and Ctrl-Z.

Only rank 0 reads and writes. At the prompt, Ctrl-C discards what is typed. While an answer is written, Ctrl-C sets a flag that
is checked between two chunks, so that no decode step is interrupted. The terminal then does not show what is typed; the next
prompt shows it. There are two cases:

    the process controls its terminal   Ctrl-C arrives as SIGINT.
    torchrun controls the terminal      torchrun starts each rank in a session of its own, and SIGINT would end torchrun and all
                                        ranks. So the terminal is set to deliver Ctrl-C as a character. Ctrl-\\ still ends
                                        torchrun.
"""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from ..distributed.groups import global_rank
from .line_editor import PASTE_OFF, PASTE_ON, LineEditor
from .user_input import UserInput, read_input

try:
    import termios
except ImportError:  # missing on Windows
    termios = None  # type: ignore[assignment]

INTERRUPT = "\x03"  # the character of Ctrl-C


def configure_stream(stream: TextIO, **options: str) -> None:
    """Set the encoding or the error handler of a standard stream. Do nothing if the stream is replaced, as in a notebook."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(**options)  # type: ignore[arg-type]


class Terminal:
    """Standard input and output of rank 0: a terminal, files or pipes. Other ranks read and write nothing.

    reads_keyboard: whether a user types messages. If not, a terminal stays as it is, and Ctrl-C raises KeyboardInterrupt.
    complete, keep_history: as for `LineEditor`.
    """

    def __init__(
        self,
        reads_keyboard: bool = True,
        complete: Callable[[str], list[str] | None] = lambda text: None,
        keep_history: bool = False,
    ) -> None:
        self.is_rank0 = global_rank() == 0
        self.keyboard = reads_keyboard and sys.stdin.isatty()
        self.has_prompt = self.keyboard and sys.stdout.isatty()
        self.complete, self.keep_history = complete, keep_history
        self.editor: LineEditor | None = None  # None if there is no prompt, so nothing to edit
        self.reading = self.interrupt_requested = self.closed = False
        self.prompt = ""  # the prompt that is shown now
        # Settings of the terminal: before the chat, at the prompt, and during an answer. None if they are not changed.
        self.original: list[Any] | None = None
        self.at_prompt: list[Any] | None = None
        self.in_answer: list[Any] | None = None
        # True if lines typed during an answer are read during it. GNU readline needs no such reading, except under torchrun,
        # where Ctrl-C arrives as a character.
        self.reads_ahead = False
        self.typed_ahead: list[str] = []  # complete lines that were read ahead

    def __enter__(self) -> "Terminal":
        if not self.is_rank0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 handles Ctrl-C for all ranks
            return self
        configure_stream(sys.stdin, errors="surrogateescape")  # invalid UTF-8 is refused later, in the line that contains it
        configure_stream(sys.stdout, errors="replace")
        if self.keyboard:
            signal.signal(signal.SIGINT, self._interrupt)
            if self.has_prompt:
                self.editor = LineEditor(self.complete, self.keep_history)
            if termios is not None:
                self._take_over_terminal()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set_terminal(self.original)

    def _take_over_terminal(self) -> None:
        """Hide what is typed from now on. If another process controls the terminal, set it to deliver Ctrl-C as a character."""
        try:
            # In the background the settings are the shell's: wait until this job has the terminal.
            if os.tcgetpgrp(0) != os.getpgrp():
                os.kill(os.getpid(), signal.SIGTTIN)
            controls_terminal = True
        except OSError:
            controls_terminal = False
        self.original, self.at_prompt, self.in_answer = (termios.tcgetattr(0) for _ in range(3))
        if not controls_terminal:
            self.reads_ahead = True
            disabled = os.fpathconf(0, "PC_VDISABLE").to_bytes(1, "little")
            for settings in (self.at_prompt, self.in_answer):
                # Ctrl-Z is disabled too: it would stop torchrun, but not the ranks.
                settings[6][termios.VINTR] = settings[6][termios.VSUSP] = disabled
                settings[6][termios.VEOL] = INTERRUPT.encode()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):  # sent by torchrun when it ends
                signal.signal(number, lambda number, _: sys.exit(128 + number))  # runs `__exit__`, which restores the terminal
            if self.editor and self.editor.is_gnu:
                self.editor.readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-v\C-c\C-m"')  # the line becomes INTERRUPT
        else:
            signal.signal(signal.SIGTSTP, self._stop)
            self.reads_ahead = not (self.editor and self.editor.is_gnu)
        if self.has_prompt:
            self.in_answer[3] &= ~termios.ECHO
        if not self.reads_ahead:  # leave all keys, such as Backspace, to readline, which reads them at the next prompt
            self.in_answer[3] &= ~(termios.ICANON | termios.IEXTEN)
            self.in_answer[6][termios.VMIN], self.in_answer[6][termios.VTIME] = 1, 0
        self._set_terminal(self.in_answer)

    def _set_terminal(self, settings: list[Any] | None) -> None:
        """Change the terminal's settings. During an answer that readline follows, also let the terminal mark pasted text."""
        if settings is None:
            return
        if self.editor and self.editor.marks_pastes and not self.reads_ahead:
            self.write({id(self.in_answer): PASTE_ON, id(self.original): PASTE_OFF}.get(id(settings), ""))
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(0, termios.TCSADRAIN, settings)

    def _interrupt(self, *_: object) -> None:
        """Handle SIGINT: at the prompt, raise KeyboardInterrupt; during an answer, only record the interrupt."""
        if self.reading:
            raise KeyboardInterrupt
        self.interrupt_requested = True
        self.typed_ahead = []

    def _stop(self, *_: object) -> None:
        """Handle Ctrl-Z: restore the terminal, stop, and when the process continues, take the terminal over again."""
        before = termios.tcgetattr(0)
        self._set_terminal(self.original)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns when the process continues
        signal.signal(signal.SIGTSTP, self._stop)
        if os.tcgetpgrp(0) != os.getpgrp():  # in the background the terminal belongs to the shell
            return
        if not self.reading:
            return self._set_terminal(self.in_answer)
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        if self.editor and self.editor.readline is not None:
            paste = PASTE_ON if self.editor.marks_pastes else ""
            self.write(paste + self.prompt + self.editor.readline.get_line_buffer())

    def read(self) -> UserInput | None:
        """Return what the user sends next; None at the end of the input, or if the reader of the output has closed the pipe.

        After Ctrl-C, return an empty text. Without a keyboard, each line is a message.
        """
        self.interrupt_requested = False
        if self.closed:
            return None
        if not self.keyboard:
            line = sys.stdin.readline()
            return UserInput(line.removesuffix("\n")) if line else None
        self._set_terminal(self.at_prompt)
        try:
            self.reading = True
            entry = read_input(self._read_line)
        except KeyboardInterrupt:
            self.write("\n")
            return UserInput("")
        except SystemExit:  # raised by a signal; the shell's prompt then gets a line of its own
            self.write("\n" if self.has_prompt else "")
            raise
        finally:
            self.reading = False
            self._set_terminal(self.in_answer)
        if entry and self.editor:
            self.editor.remember(entry.as_typed)
        return entry

    def _read_line(self, prompt: str) -> str | None:
        """Return a line that is typed; None at the end of the input. After Ctrl-C, raise KeyboardInterrupt."""
        self.prompt = prompt if self.has_prompt else ""
        if self.typed_ahead:
            if self.prompt:
                self.write(f"{self.prompt}{self.typed_ahead[0]}\n")
            return self.typed_ahead.pop(0)
        try:
            line = input(self.prompt)
        except EOFError:
            self.write("\n" if self.has_prompt else "")
            return None
        _, interrupt, line = line.rpartition(INTERRUPT)
        if interrupt and not line:
            raise KeyboardInterrupt
        return line

    def interrupted(self) -> bool:
        """Return True if the answer must end now: after Ctrl-C, or if the reader of the output has closed the pipe."""
        while self.reads_ahead and not self.interrupt_requested and select.select([0], [], [], 0)[0]:
            text = os.read(0, 4096).decode(errors="surrogateescape")  # one line, or lines that carriage returns separate
            self.interrupt_requested = INTERRUPT in text or not text
            lines = text.replace("\r", "\n").removesuffix("\n").split("\n")
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
