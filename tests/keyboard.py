"""Simulate a person at a terminal: run a program in its own pseudo-terminal, where Ctrl-C sends a signal."""

import os
import pty
import re
import select
import subprocess
import sys
import termios

from .support import environment

# Make the pseudo-terminal the controlling terminal of the program's session, so that Ctrl-C reaches the program.
START_IN_TERMINAL = """import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


class Person:
    """A person who reads the screen of a program and types on its keyboard."""

    def __init__(self, *command: object, **env: str) -> None:
        self.screen, program_end = pty.openpty()
        arguments = [sys.executable, "-c", START_IN_TERMINAL, *map(str, command)]
        self.process = subprocess.Popen(
            arguments,
            stdin=program_end,
            stdout=program_end,
            stderr=program_end,
            start_new_session=True,
            env=environment(**{"TERM": "dumb", "XDG_STATE_HOME": os.devnull} | env),  # no history is kept
        )
        os.close(program_end)
        self.unread = ""

    def sees(self, text: str, seconds: int = 90) -> str:
        """Wait until the program prints the text; return the output before the text. Fail after `seconds`.

        Time in which this process is stopped or the machine is suspended does not count.
        """
        waits = 0
        while text not in self.unread:
            if not select.select([self.screen], [], [], 1)[0]:
                waits += 1
                assert waits < seconds, f"{text!r} was not printed, but {self.unread!r}"
                continue
            try:
                screen = self.unread + os.read(self.screen, 65536).decode(errors="replace")
                self.unread = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]|\r", "", screen)  # without colors, and moves of the cursor
            except OSError:  # the program has ended and closed the terminal
                raise AssertionError(f"{text!r} was not printed before the program ended, but {self.unread!r}") from None
        before, _, self.unread = self.unread.partition(text)
        return before

    def types(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def settings(self) -> list:
        """Return the terminal's settings, among them the key that interrupts a program."""
        return termios.tcgetattr(self.screen)

    def __enter__(self) -> "Person":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # the program still runs if the test failed; SIGTERM also ends the ranks of torchrun
        os.close(self.screen)  # ends a shell, which ignores SIGTERM
        self.process.wait()

    def waits_for_the_end(self) -> int:
        """Wait until the program ends; return its exit status."""
        return self.process.wait(90)
