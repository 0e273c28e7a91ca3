"""Run chat templates in a process of their own, with bounded time, memory and output."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError

WORKER = Path(__file__).with_name("template_worker.py")
CPU_SECONDS = 2.0  # for one rendering
WALL_SECONDS = 60.0  # within which a busy machine must have given it these seconds
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 22  # of a rendered dialog, besides those of its messages
MIN_JINJA = (3, 1, 6)  # a template can leave the sandbox of older versions
NEEDS_JINJA = (
    "the chat template is rendered with jinja2 3.1.6 or later, {}: pip install 'llama[hf]' (in a clone: pip install -e "
    "'.[hf]'), or pip install 'jinja2>=3.1.6'"
)


_ALL: "weakref.WeakSet[TemplateProcess]" = weakref.WeakSet()


class TemplateProcess:
    """A process that renders templates, started at the first one. Threads take turns, and the limits are for each turn."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.close: Callable[[], object] = lambda: None  # ends the process, and closes its pipes
        _ALL.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle it without its process and lock."""
        return TemplateProcess, ()

    def render(self, template: str, marks: list[list[str]], variables: dict[str, Any], path: Path) -> str:
        """Return a template's text. path: the template's file, for errors.

        Raises InputError for a dialog that the template does not take, and CheckpointError for a template that is no valid
        one, that reaches for what the sandbox keeps from it, or that needs too much time, memory or output.
        """
        limit = MAX_CHARACTERS + sum(len(message["content"]) for message in variables["messages"])
        request = {"template": template, "marks": marks, "variables": variables, "limit": limit}
        with self.lock:
            answer = self._ask(json.dumps(request).encode() + b"\n", path)
            if answer.get("error") == "ended":  # perhaps by something else: the system may be short of memory
                answer = self._ask(json.dumps(request).encode() + b"\n", path)
            if answer.get("error") in ("time", "memory", "length", "ended"):  # because of the template, or of the dialog?
                short = request | {"variables": variables | {"messages": [{"role": "user", "content": "a"}]}}
                short_answer = self._ask(json.dumps(short).encode() + b"\n", path)
                fits = "text" in short_answer or short_answer["error"] == "refused"
                answer |= {"error": "too much"} if fits else {}
        if "text" in answer:
            return answer["text"]
        error, message = answer["error"], answer.get("message", "")
        if error == "refused":
            raise InputError(f"the model's chat template refuses the dialog: {message}")
        if error == "too much":
            raise InputError(
                f"the dialog needs more than {CPU_SECONDS:g} s of CPU time, {MEMORY_BYTES >> 20} MiB of memory or {limit:,} "
                f"characters with the model's chat template ({path}); shorten it"
            )
        if error == "dialog":
            raise InputError(f"the model's chat template ({path}) fails on the dialog: {message}")
        reason = {
            "template": f"it is not valid, or not allowed: {message}",
            "memory": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory",
            "length": f"it makes a text of more than {limit:,} characters",
            "time": f"it has not ended after {CPU_SECONDS:g} s",
            "ended": f"its process has ended ({message})",
        }[error]
        raise CheckpointError(f"{path}: the chat template is refused: {reason}; mend it, or encode dialogs yourself")

    def _ask(self, line: bytes, path: Path) -> dict[str, Any]:
        """Return the answer to a request. A process that does not answer is ended; the next request starts another."""
        process = self._start(path)
        try:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._read_line(process, time.monotonic() + WALL_SECONDS)
        except OSError:
            answer = b""
        except BaseException:  # Ctrl-C: the answer that comes later must not be taken for that to another request
            self._end()
            raise
        if answer.endswith(b"\n"):
            return json.loads(answer)
        self._end()
        timed_out = answer == b"timeout" or process.returncode == -signal.SIGPROF
        return {"error": "time"} if timed_out else {"error": "ended", "message": f"status {process.returncode}"}

    def _start(self, path: Path) -> "subprocess.Popen[bytes]":
        if self.process is not None:
            if self.process.poll() is None:
                return self.process
            self._end()
        if missing := why_no_jinja():
            raise CheckpointError(f"{path}: {NEEDS_JINJA.format(missing)}")
        # Isolated (-I), so that no file of the working folder is imported; a session of its own, so that Ctrl-C spares it.
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self.close = weakref.finalize(self, _close, self.process, os.getpid())
        setup = {"path": sys.path, "memory": MEMORY_BYTES, "seconds": CPU_SECONDS}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(setup).encode() + b"\n")
        return self.process

    def _read_line(self, process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
        """Return a line of the process's output; what there is of it if the process ends, or b"timeout"."""
        assert process.stdout is not None
        output = select.poll()  # select.select takes no file descriptors from 1,024 on
        output.register(process.stdout, select.POLLIN)
        parts = [b""]
        while not parts[-1].endswith(b"\n"):
            milliseconds = 1000 * (deadline - time.monotonic())
            if milliseconds <= 0 or not output.poll(milliseconds):
                return b"timeout"
            parts.append(os.read(process.stdout.fileno(), 1 << 16))
            if not parts[-1]:
                break
        return b"".join(parts)

    def _end(self) -> None:
        self.close()
        self.process = None


def why_no_jinja() -> str:
    """Return why templates cannot be rendered; an empty string if a jinja2 that is new enough is installed."""
    jinja = importlib.util.find_spec("jinja2")
    if jinja is None or jinja.origin is None:
        return "not installed here"
    version = importlib.metadata.version("jinja2")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    return "" if numbers >= MIN_JINJA else f"and {version} is installed here"


def _close(process: "subprocess.Popen[bytes]", owner: int) -> None:
    """End a worker. In a process that was forked from its owner, do nothing: the worker is not a child of that process."""
    if os.getpid() != owner:
        return
    process.kill()  # closing its input does not end it while a forked process has that open, too
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what could not be written any more
                pipe.close()


def _renew_after_fork() -> None:
    """Give each TemplateProcess of a forked process a lock that nobody holds, and let it start a worker of its own."""
    for each in list(_ALL):
        each.lock, each.process = threading.Lock(), None


os.register_at_fork(after_in_child=_renew_after_fork)
