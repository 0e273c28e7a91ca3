"""The process that renders chat templates: after forks, with limits, and with the version of Jinja."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llama.hugging_face.template_process import TemplateProcess

pytest.importorskip("jinja2", minversion="3.1.6")

PATH = Path("tokenizer_config.json")


def render(process: TemplateProcess, template: str, n: int = 1) -> str:
    variables: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}] * n}
    return process.render(template, [], variables, PATH)


def test_a_process_that_was_forked_during_a_rendering_renders_with_its_own_worker() -> None:
    process = TemplateProcess()
    assert render(process, "ok") == "ok"
    slow = "{% for i in range(1200) %}{% for j in range(1200) %}{% endfor %}{% endfor %}slow"
    thread = threading.Thread(target=render, args=(process, slow))
    thread.start()
    while not process.lock.locked():
        time.sleep(0.001)
    if (child := os.fork()) == 0:
        signal.alarm(8)  # ends the child if it waits for the lock
        os._exit(0 if render(process, "child") == "child" else 1)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert render(process, "ok") == "ok"


FORK = """
import os, sys, time
from pathlib import Path
from llama.hugging_face.template_process import TemplateProcess
process = TemplateProcess()
process.render("ok", [], {"messages": []}, Path("x"))
if os.fork() == 0:
    sys.stdout.close(), os.close(1), os.close(2)
    time.sleep(float(sys.argv[1]))
    os._exit(0)
"""


def test_a_process_ends_while_one_that_was_forked_from_it_still_runs() -> None:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", FORK, "20"], check=True, timeout=15, capture_output=True)
    assert time.monotonic() - began < 15
