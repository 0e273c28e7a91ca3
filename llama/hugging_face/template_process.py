"""Run chat templates in a process of their own, with bounded time, memory and output."""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError

WORKER = Path(__file__).with_name("template_worker.py")
CPU_SECONDS = 2.0  # for one rendering
WALL_SECONDS = 60.0  # within which a busy machine must have given it these seconds
MEMORY_BYTES = 1 << 30
MAX_LETTERS = 1 << 22  # of a rendered dialog, besides those of its messages
NEEDS_JINJA = (
    "the chat template is rendered with jinja2, not installed here: pip install jinja2, or in a clone pip install -e '.[hf]'"
)


class TemplateProcess:
    """A process that renders templates, started at the first one. Threads take turns."""

    def __init__(self) -> None:
        self.lock, self.owner = threading.Lock(), 0  # owner: the process that has started the worker
        self.process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, marks: list[list[str]], variables: dict[str, Any], path: Path) -> str:
        """Return a template's text. path: the template's file, for errors.

        Raises InputError for a dialog that the template does not take, and CheckpointError for a template that is no valid
        one, that reaches for what the sandbox keeps from it, or that needs too much time, memory or output.
        """
        limit = MAX_LETTERS + sum(len(message["content"]) for message in variables["messages"])
        request = {"template": template, "marks": marks, "variables": variables, "limit": limit}
        with self.lock:
            answer = self._ask(json.dumps(request).encode() + b"\n", path)
        if "text" in answer:
            return answer["text"]
        error, message = answer["error"], answer.get("message", "")
        if error == "refused":
            raise InputError(f"the model's chat template refuses the dialog: {message}")
        if error == "dialog":
            raise InputError(f"the model's chat template ({path}) fails on the dialog: {message}")
        reason = {
            "template": f"it is not valid, or not allowed: {message}",
            "memory": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory",
            "length": f"it makes a text of more than {limit:,} letters",
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
            self._end(process)
            raise
        if answer.endswith(b"\n"):
            return json.loads(answer)
        self._end(process)
        timed_out = answer == b"timeout" or process.returncode == -signal.SIGPROF
        return {"error": "time"} if timed_out else {"error": "ended", "message": f"status {process.returncode}"}

    def _start(self, path: Path) -> "subprocess.Popen[bytes]":
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return self.process
        jinja = importlib.util.find_spec("jinja2")
        if jinja is None or jinja.origin is None:
            raise CheckpointError(f"{path}: {NEEDS_JINJA}")
        # Isolated (-I), so that no file of the working folder is imported; a session of its own, so that Ctrl-C spares it.
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self.owner = os.getpid()
        weakref.finalize(self, _close, self.process)
        setup = {"path": sys.path, "memory": MEMORY_BYTES, "seconds": CPU_SECONDS}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(setup).encode() + b"\n")
        return self.process

    def _read_line(self, process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
        """Return a line of the process's output; what there is of it if the process ends, or b"timeout"."""
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return b"timeout"
            if not (part := os.read(process.stdout.fileno(), 1 << 16)):
                return line
            line += part
        return line

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        process.kill()
        process.wait()
        self.process = None


def _close(process: "subprocess.Popen[bytes]") -> None:
    """End a worker that waits for requests, by closing its input."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()
