"""Test chats in a terminal, between pipes, and on two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama import InputError, Llama
from llama.chat import UNSAFE_ERROR
from llama.cli.line_editor import MAX_ENTRIES, History, LineEditor, history_path

from . import command_line
from .command_line import CONTEXT, LLAMA, LLAMA_2, answer, spawn
from .support import ROOT, TORCHRUN

talker, llama, command = command_line.talker, command_line.llama, command_line.command  # fixtures


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("start", [LLAMA, LLAMA_2], ids=["1 rank", "2 ranks"])
def test_a_chat_in_a_terminal_can_be_interrupted_saved_cleared_and_left(
    start: tuple, talker: tuple, llama: Llama, tmp_path: Path
) -> None:
    """Interrupt an answer, save the dialog and ask again. The next answer must continue the saved dialog, so on two ranks both
    must have ended the interrupted answer at the same token."""
    from .keyboard import Person

    with Person(*start, "chat", *talker) as person:
        settings = person.settings()
        person.sees("Ctrl-D leaves")
        person.sees("\n> ")
        person.types("never sent")
        person.sees("never sent")
        time.sleep(0.2)  # give readline time to wait for the next key; until then readline delays signals
        person.types("\x03")
        person.sees("\n> ")
        person.types("seven?\n")
        person.sees(answer(llama, "seven?", n=20))
        person.types("typed ahead\x03")
        assert "typed" not in person.sees("\n> ")
        person.types(f"/save {tmp_path}/talk.json\n")
        person.sees("\nsaved in")
        person.sees("\n> ")
        question, reply = json.loads((tmp_path / "talk.json").read_text())
        assert question == {"role": "user", "content": "seven?"}
        assert reply["content"].startswith(answer(llama, "seven?", n=20))
        assert len(reply["content"]) < len(answer(llama, "seven?", n=CONTEXT))

        person.types("good morning\n")
        person.sees(answer(llama, "seven?", reply["content"], "good morning", n=20))
        person.types("/clear\n[INST]\n")
        person.types("\x03")
        person.sees("\n> ")
        person.types("/clear\n")
        person.sees("cleared\n> ")
        person.types("[INST]\n")
        person.sees(f"{UNSAFE_ERROR}\n> ")
        person.types("\x04")
        assert person.waits_for_the_end() == 0
        assert person.settings() == settings


CHAT_WITH_SHORT_TIMEOUTS = """
import sys
from datetime import timedelta
import torch.distributed as dist
from llama.cli import main
from llama.distributed import setup

def init_with_short_timeouts(size):
    init_model_parallel(size)
    for group in (dist.group.WORLD, setup.fs.get_model_parallel_group()):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)

init_model_parallel, setup.init_model_parallel = setup.init_model_parallel, init_with_short_timeouts
sys.exit(main.main())
"""


def test_ranks_wait_for_input_longer_than_the_timeout_of_process_groups(talker: tuple, llama: Llama, tmp_path: Path) -> None:
    """Shorten the timeout of process groups from half an hour to two seconds, and send input after four seconds."""
    script = tmp_path / "chat.py"
    script.write_text(CHAT_WITH_SHORT_TIMEOUTS)
    with spawn(*TORCHRUN, 2, script, "chat", *talker, "--lines", "--max_gen_len", 8) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"seven?\n")
        process.stdin.flush()
        want = answer(llama, "seven?", n=8).encode() + b"\n"
        assert process.stdout.read(len(want)) == want
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4)
        process.stdin.write(b"good morning")
        process.stdin.close()
        want = answer(llama, "seven?", answer(llama, "seven?", n=8), "good morning", n=8).encode() + b"\n"
        assert process.stdout.read() == want, process.stderr.read()
    assert process.returncode == 0


def test_piped_lines_are_questions_and_never_commands(talker: tuple, llama: Llama, command: Callable) -> None:
    """Send questions, special tags and invalid UTF-8. After a line that is refused, the chat must answer the next line."""
    lines = b"good morning\n\nseven? [INST]\ncaf\xe9\n/save seven"
    code, out, err = command("chat", *talker, "--max_gen_len", "8", "--lines", stdin=lines)
    first = answer(llama, "good morning", n=8)
    assert code == 1 and out == first + "\n" + answer(llama, "good morning", first, "/save seven", n=8) + "\n"
    first_line, unsafe, invalid, last_line, summary = err.removesuffix("\n").split("\n")
    assert first_line == last_line == "the answer is cut off: max_gen_len=8"
    assert summary.startswith("llama: 2 line(s) were refused")
    assert unsafe == UNSAFE_ERROR and invalid.startswith("the user text holds a lone surrogate")


def test_standard_input_and_arguments_are_one_question(talker: tuple, llama: Llama, command: Callable) -> None:
    short = *talker, "--max_gen_len", "4"
    piped = b"\xef\xbb\xbf/clear\none, two\n"
    for question, arguments, stdin in (
        ("/clear\none, two", (), piped),
        ("good morning", ("good", "morning"), b""),
        ("/clear\none, two\n\nseven?", ("seven?",), piped),
    ):
        code, out, err = command("chat", *arguments, *short, stdin=stdin)
        assert (code, out, err) == (0, answer(llama, question, n=4) + "\n", "the answer is cut off: max_gen_len=4\n")
    code, out, err = command("chat", *short, "--verbose", "seven?")
    assert code == 0 and "\nprompt: " in err and "answer: 4 tokens, " in err
    code, out, err = command("chat", *short, "sea " * CONTEXT)
    assert (code, out) == (1, "") and err.startswith("llama: the question has ")
    assert command("chat", *short, "--lines") == (0, "", "")


def test_a_base_model_is_told_by_its_name(talker: tuple, command: Callable, tmp_path: Path) -> None:
    for name, is_base in {"llama-2-7b": True, "CodeLlama-7b-Python": True, "llama-2-7b-chat": False, "mine": False}.items():
        (tmp_path / name).mkdir()
        for file in Path(talker[1]).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        code, _, err = command("chat", "--ckpt_dir", str(tmp_path / name), *talker[2:], "--max_gen_len", "1", "hi")
        assert (
            code == 0
            and err.startswith(f"{name} is a base model by its name, and not trained to answer; `complete` is") == is_base
        )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_chat_edits_pastes_and_characters_of_any_script_and_gives_the_terminal_back(
    talker: tuple, llama: Llama, tmp_path: Path
) -> None:
    """Talk in a shell under a locale without UTF-8: paste, type ahead, press Backspace, Tab and Ctrl-Z, and leave."""
    pytest.importorskip("readline")
    from .keyboard import Person

    shell = "import os; os.execlp('sh', 'sh', '-i')"
    env = {"TERM": "xterm", "LC_ALL": "C", "PS1": "shell: ", "ENV": "", "XDG_STATE_HOME": str(tmp_path)}
    with Person("-c", shell, **env) as person:
        person.sees("shell: ")
        settings = person.settings()
        person.types(" ".join([sys.executable, *LLAMA, "chat", *talker]) + "\n")
        person.sees("Ctrl-D leaves")
        person.sees("\n> ")
        person.types("Привет 日本語x")
        person.sees("x")
        person.types("\x7f\x7f \x1b[200~/clear\rone\tsix\n\x1b[201~\r")
        want = answer(llama, "Привет 日本 /clear\none\tsix", n=20)
        person.sees(want)
        person.types("\x1a")
        person.sees("shell: ")
        assert person.settings() == settings
        person.types("fg\n")
        person.sees(f"{CONTEXT}\n")  # the shell shows the command again
        person.sees(want[-1])  # the answer goes on
        person.types("\x03")
        person.sees("\n> ")
        person.types("/set max_gen_len 8\rseven?\rtyped ahexd\x7f\x7fad\r")  # two lines are typed ahead
        person.sees("max_gen_len is 8\n> ")
        person.sees("cut off: max_gen_len=8\n> ")
        person.sees("cut off: max_gen_len=8\n> ")
        person.types(f"/sa\t{tmp_path}/ta")
        person.sees(f"/save {tmp_path}/ta")
        person.types("lk.json\r")
        person.sees("\nsaved in")
        person.sees("\n> ")
        person.types("quit\r")
        person.sees("\nshell: ")
        assert person.settings() == settings
    questions = [m["content"] for m in json.loads((tmp_path / "talk.json").read_text()) if m["role"] == "user"]
    assert questions == ["Привет 日本 /clear\none\tsix", "seven?", "typed ahead"]
    history = tmp_path / "llama" / "history"
    assert history.read_bytes().decode().split("\n")[:2] == ["Привет 日本 /clear\r", "one\tsix"]
    assert history.stat().st_mode & 0o777 == 0o600


ECHO_SCRIPT = """
import sys
sys.modules["readline"] = None
import os, signal, time
from llama.cli.terminal import Terminal
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
with Terminal() as terminal:
    while (entry := terminal.read()) is not None:
        terminal.write("answer...\\n")
        while entry.text == "wait" and not terminal.interrupted() and not terminal.typed_ahead:
            time.sleep(0.01)
        terminal.write(f"{entry}\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_without_readline_still_hides_and_keeps_what_is_typed_ahead() -> None:
    from .keyboard import Person

    with Person("-c", ECHO_SCRIPT) as person:
        settings = person.settings()
        person.sees("> ")
        person.types("wait\n")
        person.sees("answer...\n")
        person.types("typed ahexd\x7f\x7fad\n")
        assert person.sees("\n> ") == "UserInput(text='wait', may_be_command=True)"
        person.sees("typed ahead\nanswer...\nUserInput(text='typed ahead', may_be_command=True)\n> ")
        person.types('"""one\ntwo"""\n')
        person.sees("... ")
        person.sees("text='one\\ntwo', may_be_command=False")
        person.types("wait\n")
        person.sees("answer...\n")
        person.types("\x03")
        person.sees("\n> ")
        person.types('"""never sent\n')
        person.sees("... ")
        time.sleep(0.2)  # give Python time to wait for the next line; a signal that comes just before is handled after the line
        person.types("\x03")
        person.sees("text='', ")
        person.types("wait\n")
        person.sees("answer...\n")
        person.process.terminate()
        assert person.waits_for_the_end() == 128 + signal.SIGTERM and person.settings() == settings


def test_libedit_completes_at_tab_and_pastes_are_typed_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    class Libedit:
        __doc__ = "Importing this module enables command line editing using libedit readline."

        def __getattr__(self, name: str) -> Callable:
            return lambda *arguments: calls.append((name, *arguments))

    monkeypatch.setitem(sys.modules, "readline", Libedit())
    editor = LineEditor(lambda text: [f"{text}!"], keep_history=False)
    assert not editor.marks_pastes and ("parse_and_bind", "bind ^I rl_complete") in calls
    (completer,) = [arguments[0] for name, *arguments in calls if name == "set_completer"]
    assert [completer("/x", 0), completer("/x", 1)] == ["/x!", None]


def test_the_history_file_is_private_and_short_and_its_failures_do_not_disturb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_path()
    assert path == tmp_path / "llama" / "history" and History(path).entries == []
    history = History(path)
    for entry in ("one", "one", "two\nthree", "日本 \udcff", "one"):
        history.add(entry)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert History(path).entries == ["one", "two\nthree", "日本 ?", "one"]
    for i in range(2 * MAX_ENTRIES):
        history.add(f"{i}\n{i}")
    assert History(path).entries == History(path).entries == [f"{i}\n{i}" for i in range(MAX_ENTRIES, 2 * MAX_ENTRIES)]
    assert path.read_bytes().count(b"\r\n") == MAX_ENTRIES and [*path.parent.iterdir()] == [path]
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    History(history_path()).add("one")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored, says the specification
    assert history_path() == Path.home() / ".local" / "state" / "llama" / "history"


def test_a_chat_whose_output_pipe_is_closed_ends_silently(talker: tuple) -> None:
    """Close the output pipe in the middle of an answer, as `head` does."""
    with spawn(*LLAMA, "chat", *talker, "--lines") as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"good morning\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


def test_the_complete_command_exits_with_130_after_ctrl_c(talker: tuple) -> None:
    with spawn(*LLAMA, "complete", *talker, "--max_gen_len", CONTEXT, "good morning") as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(15) == b"good morning\n> "
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


def test_the_chat_command_builds_metas_models_with_a_context_of_4096_by_default(
    talker: tuple, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record the context length that the chat command passes to `Llama.build`. Without --ckpt_dir the command uses the demo
    model, which has a context of 512 tokens."""
    code, out, err = command("chat", "hi", "--max_seq_len", "0", "--device", "cpu")
    assert (code, out) == (1, "") and "max_seq_len is 0 (int); it must be" in err
    context_lengths: list[int] = []

    def record(*args: Any, **_: Any) -> None:
        context_lengths.append(args[2])
        raise InputError("this test builds no model")

    monkeypatch.setattr(Llama, "build", record)
    for flags in ((), talker[:4], (*talker[:4], "--max_seq_len", "64")):
        assert command("chat", "hi", *flags)[0] == 1
    assert context_lengths == [512, 4096, 64]


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
@pytest.mark.parametrize("command", ["chat --lines", "complete a b", "plan --model 7B"])
def test_commands_work_with_a_closed_stdin_stdout_or_stderr(talker: tuple, closed: str, command: str) -> None:
    flags = "" if command.startswith("plan") else " ".join(talker)
    done = subprocess.run(
        f"{sys.executable} {' '.join(LLAMA)} {command} {flags} {closed}", shell=True, cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
