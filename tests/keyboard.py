"""A person at a terminal: a program in a pseudo-terminal of its own, where Ctrl-C is a signal as it is at a desk."""

import os
import pty
import select
import subprocess
import sys
import termios

from .support import environment

# The program becomes the first of a session whose terminal is the pseudo-terminal.
SEATED = """import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


class Person:
    def __init__(self, *command: object) -> None:
        self.screen, theirs = pty.openpty()
        arguments = [sys.executable, "-c", SEATED, *map(str, command)]
        self.process = subprocess.Popen(
            arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment(TERM="dumb")
        )
        os.close(theirs)
        self.unread = ""

    def sees(self, text: str, seconds: int = 90) -> str:
        """Wait for the text; what came before it. The seconds are those that this process is running."""
        waits = 0
        while text not in self.unread:
            if not select.select([self.screen], [], [], 1)[0]:
                waits += 1
                assert waits < seconds, f"{text!r} did not come, but {self.unread!r}"
                continue
            try:
                self.unread += os.read(self.screen, 65536).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the program has left
                raise AssertionError(f"{text!r} did not come before the end, but {self.unread!r}") from None
        before, _, self.unread = self.unread.partition(text)
        return before

    def types(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def settings(self) -> list:
        """How the terminal is set: Ctrl-C's key and the like."""
        return termios.tcgetattr(self.screen)

    def __enter__(self) -> "Person":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # a test that failed; torchrun ends its ranks
        self.process.wait()
        os.close(self.screen)

    def waits_for_the_end(self) -> int:
        return self.process.wait(90)
