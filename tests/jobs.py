"""Run a command, watch all processes that it starts, and kill them when the test ends."""

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
    """A command that runs in the background. All its processes are recognized by a variable in their environment."""

    def __init__(self, folder: Path, *command: object, before: tuple[str, ...] = (sys.executable,), **env: str) -> None:
        self.mark = f"{os.getpid()}-{next(NUMBERS)}"
        self.files = {name: folder / f"{name}-{self.mark}" for name in ("stdout", "stderr")}
        # If the tests run in the background, SIGINT is ignored, and the command would ignore it too.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with self.files["stdout"].open("wb") as out, self.files["stderr"].open("wb") as err:
                self.process = subprocess.Popen(
                    [*before, *map(str, command)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                    env=environment(LLAMA_TEST_JOB=self.mark, **env),
                )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, previous)

    @property
    def stdout(self) -> str:
        return self.files["stdout"].read_text()

    @property
    def stderr(self) -> str:
        return self.files["stderr"].read_text()

    def alive(self) -> list[int]:
        """Return the ids of all processes of the job that have not ended."""
        mark, pids = f"LLAMA_TEST_JOB={self.mark}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # the process has just ended, or belongs to another user
                marked = mark in (folder / "environ").read_bytes().split(b"\0")
                if marked and "\nState:\tZ" not in (folder / "status").read_text():
                    pids.append(int(folder.name))
        return pids

    def sees(self, text: str, stream: str = "stderr", seconds: float = 90) -> None:
        """Wait until the job has printed the text; fail if the command ends first or `seconds` pass."""
        wait_for(lambda: text in self.files[stream].read_text() or self.process.poll() is not None, seconds)
        assert text in self.files[stream].read_text(), f"{text!r} was not printed, but {self.stdout}{self.stderr}"

    def ends(self, seconds: float = 30) -> float:
        """Wait until the command and all its processes have ended; return the seconds until the command ended."""
        start = time.monotonic()
        ended = wait_for(lambda: self.process.poll() is not None, seconds)
        took = time.monotonic() - start
        assert ended, f"the command still runs after {seconds} s; stderr so far: {self.stderr[-3000:]}"
        assert wait_for(lambda: not self.alive(), 3), f"processes left behind: {self.alive()}"
        return took

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def watch_all(watch: Callable[[Any, Job], None], jobs: dict[Any, Job]) -> None:
    """Call `watch(key, job)` for all jobs in parallel, to save time; kill all jobs at the end."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for job in jobs.values():
            stack.enter_context(job)
        list(pool.map(watch, jobs.keys(), jobs.values()))


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    """Wait until `done()` is true; return False if it is still false after `seconds`.

    Time in which this process is stopped or the machine is suspended does not count.
    """
    for _ in range(int(20 * seconds)):
        if done():
            return True
        time.sleep(0.05)
    return done()
