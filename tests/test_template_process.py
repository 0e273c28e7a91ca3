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

from llama import CheckpointError, InputError
from llama.hugging_face import template_process
from llama.hugging_face.template_process import TemplateProcess

from .support import assert_raises

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


LOOPS = "{% for a in range(N) %}{% for b in range(N) %}{% endfor %}{% endfor %}"


def test_a_rendering_whose_process_is_killed_is_done_again() -> None:
    process, texts = TemplateProcess(), list[str]()
    assert render(process, "ok") == "ok" and process.process
    worker = process.process
    thread = threading.Thread(target=lambda: texts.append(render(process, LOOPS.replace("N", "4000") + "slow")))
    thread.start()
    while not process.lock.locked():
        time.sleep(0.001)
    time.sleep(0.1)
    worker.kill()
    thread.join()
    assert texts == ["slow"] and process.process is not worker


def test_a_dialog_that_ends_the_process_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MEMORY_BYTES", 128 << 20)
    process = TemplateProcess()
    messages = [{"role": "user", "content": "a" * (100 << 20)}]  # the process has too little memory even to read it
    assert_raises(lambda: process.render("ok", [], {"messages": messages}, PATH), InputError, "128 MiB of memory", "shorten it")
    assert render(process, "ok") == "ok"


def test_a_template_that_ends_the_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = "import sys; sys.stdin.readline(); sys.stdin.readline(); sys.exit(3)"
    monkeypatch.setattr(template_process, "WORKER", Path("-c"))
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen([*command, worker], **options))
    assert_raises(lambda: render(TemplateProcess(), "ok"), CheckpointError, "its process has ended (status 3)")


def test_processes_that_were_ended_leave_no_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.05)
    process, slow = TemplateProcess(), "{% if messages[1] %}" + LOOPS.replace("N", "99999") + "{% endif %}"
    assert render(process, slow) == "" and process.process
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        assert_raises(lambda: render(process, slow, 2), InputError, "0.05 s of CPU time")
    process.process.kill()
    process.process.wait()
    assert render(process, slow) == "" and len(os.listdir("/dev/fd")) == before


def test_the_time_that_a_thread_waits_for_others_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    process, texts = TemplateProcess(), list[str]()
    assert render(process, "ok") == "ok"
    monkeypatch.setattr(template_process, "WALL_SECONDS", 1)
    with process.lock:
        thread = threading.Thread(target=lambda: texts.append(render(process, "waited")))
        thread.start()
        time.sleep(1.1)
    thread.join()
    assert texts == ["waited"]


def test_a_long_text_is_read_in_time_proportional_to_its_length() -> None:
    content, began = "a" * (64 << 20), time.monotonic()
    messages = [{"role": "user", "content": content}]
    assert TemplateProcess().render("{{ messages[0].content }}", [], {"messages": messages}, PATH) == content
    assert time.monotonic() - began < 8  # 18 s if each part that is read were copied together with all before


def test_a_process_with_more_than_1024_open_files_renders() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this system allows too few open files")
    opened: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (1200, hard))
    try:
        while not opened or opened[-1] < 1030:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        assert render(TemplateProcess(), "ok") == "ok"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in opened:
            os.close(number)


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
