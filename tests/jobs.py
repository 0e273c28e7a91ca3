"""A command and all that it starts: watched from outside, and gone when a test is over."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .support import environment

NUMBERS = itertools.count()


class Job:
    """What it started is known by a mark in its environment. Seconds to wait are those that this process is running."""

    def __init__(self, folder: Path, *command: object, before: tuple[str, ...] = (sys.executable,), **env: str) -> None:
        self.mark = f"{os.getpid()}-{next(NUMBERS)}"
        self.files = {name: folder / f"{name}-{self.mark}" for name in ("stdout", "stderr")}
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and so by children
        try:
            with self.files["stdout"].open("wb") as out, self.files["stderr"].open("wb") as err:
                self.process = subprocess.Popen(
                    [*before, *map(str, command)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                    env=environment(LLAMA_TEST_JOB=self.mark, **env),
                )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, ours)

    @property
    def stdout(self) -> str:
        return self.files["stdout"].read_text()

    @property
    def stderr(self) -> str:
        return self.files["stderr"].read_text()

    def alive(self) -> list[int]:
        """All processes of the job."""
        mark, found = f"LLAMA_TEST_JOB={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended, or is another's
                marked = mark in (folder / "environ").read_bytes().split(b"\0")
                if marked and "\nState:\tZ" not in (folder / "status").read_text():
                    found.append(int(folder.name))
        return found

    def sees(self, text: str, where: str = "stderr", seconds: float = 90) -> None:
        wait_for(lambda: text in self.files[where].read_text() or self.process.poll() is not None, seconds)
        assert text in self.files[where].read_text(), f"{text!r} did not come, but {self.stdout}{self.stderr}"

    def ends(self, seconds: float = 30) -> float:
        """Wait until the command has ended, and all that it started; the seconds that took."""
        begun = time.monotonic()
        ended = wait_for(lambda: self.process.poll() is not None, seconds)
        took = time.monotonic() - begun
        assert ended, f"it goes on after {seconds} s; stderr so far: {self.stderr[-3000:]}"
        assert wait_for(lambda: not self.alive(), 3), f"left behind: {self.alive()}"
        return took

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def at_once(watch: Callable[[Any, Job], None], jobs: dict[Any, Job]) -> None:
    """Watch jobs that run beside each other, which takes less time than one after the other."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for job in jobs.values():
            stack.enter_context(job)
        list(pool.map(watch, jobs.keys(), jobs.values()))


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    for _ in range(int(20 * seconds)):
        if done():
            return True
        time.sleep(0.05)
    return done()
