"""Test the check of flags, for the command line and for the example scripts."""

import inspect
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama import InputError
from llama.cli import main as cli
from llama.cli.flags import normalize_flags
from llama.cli.process import exit_code, name_flags
from llama.cli.script import parse_flags

from .support import ROOT, run, torchrun

KNOWN = ["ckpt_dir", "temperature", "compile"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ckpt-dir", "a-b", "--compile"], ["--ckpt_dir", "a-b", "--compile"]),
        (["--ckpt-dir=a--b", "text with --flags"], ["--ckpt_dir=a--b", "text with --flags"]),
        (["--temperature", "-1", "-h"], ["--temperature", "-1", "-h"]),
        (["--", " --ckpt_dir", "--other", "—ckpt_dir", " "], ["--", " --ckpt_dir", "--other", "—ckpt_dir", " "]),
        (["--ckpt-dir", " "], ["--ckpt_dir", " "]),
        ([" a text", "- item", "— dialogue", "--compile"], [" a text", "- item", "— dialogue", "--compile"]),
    ],
)
def test_hyphens_and_underscores_are_equal_in_flags_and_other_arguments_are_unchanged(arguments: list, expected: list) -> None:
    assert normalize_flags(arguments, KNOWN, KNOWN[:2]) == expected


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--temprature", "0"], "unknown flag --temprature; did you mean --temperature?"),
        (["--xyz"], "unknown flag --xyz; --help lists all flags"),
        (["--ckpt_dir"], "--ckpt_dir needs a value"),
        (["--ckpt_dir", "--compile"], "--ckpt_dir needs a value"),
        ([" --ckpt_dir", "X"], "' --ckpt_dir' begins with a blank; a backslash"),
        (["\n--ckpt-dir=X"], "begins with a blank"),
        (["--compile", " "], "' ' is only a blank; a backslash continues a command only at the very end of a line"),
        (["–ckpt_dir", "X"], "begins with a dash that is not a hyphen; write --ckpt_dir"),
        (["—temperature=0"], "begins with a dash that is not a hyphen; write --temperature"),
    ],
)
def test_a_wrong_flag_is_named_with_the_way_out(arguments: list, error: str) -> None:
    with pytest.raises(InputError) as caught:
        normalize_flags(arguments, KNOWN, KNOWN[:2])
    assert error in str(caught.value)


def example_main(ckpt_dir: str | None = None, max_seq_len: int = 5, temperature: float = 0.6, compile: bool = False) -> None:
    raise AssertionError("parsing flags must not call main")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ckpt_dir", "13"], {"ckpt_dir": "13"}),
        (["--ckpt-dir=013", "--max-seq-len", "7"], {"ckpt_dir": "013", "max_seq_len": 7}),
        (["--ckpt_dir", "1e3", "--compile", "--temperature", "-1"], {"ckpt_dir": "1e3", "compile": True, "temperature": -1}),
        (["--ckpt_dir", "it's {a}", "--nocompile"], {"ckpt_dir": "it's {a}", "compile": False}),
        (["--ckpt_dir", "None", "--compile=False"], {"ckpt_dir": None, "compile": False}),
        (["--compile=false"], {"compile": False}),
    ],
)
def test_fire_gets_texts_as_they_are_and_numbers_as_numbers(arguments: list, expected: dict) -> None:
    assert parse_flags(example_main, arguments)[1] == {}
    parameters = dict(zip(inspect.signature(example_main).parameters, parse_flags(example_main, arguments)[0], strict=True))
    assert {name: parameters[name] for name in expected} == expected


@pytest.mark.parametrize("arguments", [["--temprature", "0"], ["--ckpt_dir"], ["a", "1", "1.0", "True", "too many"]])
def test_a_script_exits_with_2_for_a_wrong_flag_before_it_begins(arguments: list, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags(example_main, arguments)
    assert caught.value.code == 2 and capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        ([], 0, "usage: python -m llama"),
        (["--version"], 0, "llama 0."),
        (["chta"], 2, "'chta' is not a command; did you mean chat?"),
        (["xyz"], 2, "the commands are chat, complete"),
        (["--ckpt_dir", "x", "chat"], 2, "the command must come first, before --ckpt_dir"),
        (["plan", "--model", "7B", "--max-seq-len"], 2, "plan: --max_seq_len needs a value"),
        (["complete", " --ckpt_dir", "X", "hi"], 2, "complete: ' --ckpt_dir' begins with a blank"),
        (["chat", "--temprature", "0.3"], 2, "chat: unknown flag --temprature; did you mean --temperature?"),
    ],
)
def test_the_command_line_checks_its_arguments(
    arguments: list, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    output = "".join(capsys.readouterr())
    assert caught.value.code == code and printed in output
    assert code == 0 or output.count("\n") == 1


def test_an_example_checks_its_flags_once_before_it_loads_the_model() -> None:
    done = run(ROOT / "example_chat_completion.py", "--top_p", 3)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith("llama: --top_p is 3 (int)") and done.stderr.count("\n") == 1
    )  # the demo model is not announced
    done = torchrun(2, ROOT / "example_text_completion.py", "--temprature", 3)
    assert done.stderr.count("did you mean --temperature?") == 1


def test_an_example_prints_question_marks_for_characters_that_the_terminal_lacks(small: SimpleNamespace) -> None:
    flags = "--ckpt_dir", small.folder, "--tokenizer_path", small.tokenizer_path
    done = run(ROOT / "example_chat_completion.py", *flags, "--temperature", 0, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("==================================") == 6 and "?" in done.stdout


@pytest.mark.parametrize("program", [["-m", "llama", "chat"], [ROOT / "example_chat_completion.py"]])
def test_ctrl_c_during_the_import_of_torch_prints_no_traceback(program: list, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = run(*program, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_later_ends_a_program_with_130_after_its_finally_blocks() -> None:
    ended = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        finally:
            ended.append(True)

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        assert exit_code(work) == 130 and ended
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("fits with max_seq_len=1841, or dtype='bfloat16' (1 GB)", "fits with --max_seq_len 1841, or --dtype bfloat16 (1 GB)"),
        ("ckpt_dir is 'my ckpt_dir x': missing", "--ckpt_dir is 'my ckpt_dir x': missing"),
        ("a/ckpt_dir/b and ckpt_dir.txt: the dtype of --ckpt_dir", "a/ckpt_dir/b and ckpt_dir.txt: the dtype of --ckpt_dir"),
        ("dtype is 'x'; the dtype is wrong", "--dtype is 'x'; the dtype is wrong"),
        ("max_batch_size=1 and xmax_seq_len=2", "max_batch_size=1 and xmax_seq_len=2"),
        ("give its path as tokenizer_path.", "give its path as --tokenizer_path."),
    ],
)
def test_errors_name_flags_on_the_command_line(message: str, expected: str) -> None:
    assert name_flags(message, ["max_seq_len", "dtype", "ckpt_dir", "tokenizer_path"]) == expected
