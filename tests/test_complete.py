"""Test the complete command: texts, files and JSON lines that it completes, and arguments that commands refuse."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama import InputError, Llama
from llama.chat import UNSAFE_ERROR
from llama.cli.complete import read_json_lines, read_texts
from llama.cli.model_options import sampling_parser

from . import command_line
from .command_line import CONTEXT, LLAMA
from .support import torchrun

talker, llama, command = command_line.talker, command_line.llama, command_line.command  # fixtures
STOP_FLAGS = {
    r"\n": "\n", r"a\n\tb": "a\n\tb", r"\r\n": "\r\n", r"\\n": r"\n", r"\d\begin": r"\d\begin", "\n": "\n", "end\\": "end\\",
}  # fmt: skip


def test_the_complete_command_completes_arguments_stdin_and_on_two_ranks_json_lines(
    talker: tuple, llama: Llama, command: Callable
) -> None:
    prompts = ["the lazy dog", "She sells"]
    first, second = (r["generation"] for r in llama.text_completion(prompts, temperature=0, max_gen_len=6))
    short = *talker, "--max_gen_len", "6"
    assert command("complete", *short, prompts[0]) == (0, f"{prompts[0]}\n> {first}\n", "")
    assert command("complete", *short, stdin=f"{prompts[0]}\n".encode()) == (0, f"{prompts[0]}\n> {first}\n", "")
    both = f"{prompts[0]}\n> {first}\n\n{prompts[1]}\n> {second}\n\n"
    assert command("complete", *short, *prompts) == (0, both, "")
    two_ranks = torchrun(
        2, *LLAMA, "complete", *short, "--jsonl", stdin="".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    )
    assert [json.loads(line)["generation"] for line in two_ranks.stdout.splitlines()] == [first, second], two_ranks.stderr


def test_the_complete_command_prints_a_json_line_with_details_for_each_prompt(
    talker: tuple, llama: Llama, command: Callable
) -> None:
    prompts = ["the lazy dog", '写\n"', "She sells"]
    stop = llama.text_completion(["She sells"], temperature=0, max_gen_len=6)[0]["generation"][-1]
    lines = "".join(json.dumps({"prompt": prompt}) + "\n\n" for prompt in prompts).encode()
    flags = *talker, "--max_gen_len", "6", "--max_batch_size", "2", "--stop", stop
    code, out, err = command("complete", *flags, "--jsonl", stdin=lines)
    assert (code, err) == (0, "")
    results = [json.loads(line) for line in out.splitlines()]
    for prompt, result in zip(prompts, results, strict=True):
        (want,) = llama.text_completion([prompt], temperature=0, max_gen_len=6, stop=stop, details=True)
        assert result == {"prompt": prompt} | dict(want)
    assert {result["finish_reason"] for result in results} >= {"stop"}


def test_the_error_about_a_prompt_that_is_too_long_names_its_line(talker: tuple, command: Callable) -> None:
    lines = '{"prompt": "a"}\n\n' + json.dumps({"prompt": "sea " * CONTEXT}) + "\n"
    code, out, err = command("complete", *talker, "--jsonl", stdin=lines.encode())
    assert (code, out) == (1, "") and err.startswith("llama: line 3: its prompt has ") and "max_seq_len" in err


def test_empty_standard_input_is_refused_and_a_byte_order_mark_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(InputError, match="standard input contains no text"):
        read_texts([])
    # Some editors begin a file with a byte order mark.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf{"prompt": "a"}')))
    assert read_json_lines(["-"], []) == ([{"prompt": "a"}], ["line 1: its prompt"])


@pytest.mark.parametrize(
    "lines, error",
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"\n', """line 3 is '{"prompt": "b"' (str): not JSON ("""),
        ('{"prompt": "a",}\n', "at column 16)"),
        ("5\n", "line 1 is 5 (int); it must be"),
        ("[" * 100_000, "line 1 is '[[[["),
        ('{"prompt": "a", "max_gen_len": 5}\n', 'line 1 has "max_gen_len", but options apply to all lines; give --max_gen_len'),
        ('{"prompt": "a", "generation": ""}\n', 'line 1 has "generation", a key that the answer adds; rename or remove it'),
        ('{"prompt": "a"}\n{"id": 5}\n', 'line 2 is {\'id\': 5} (dict); it must be {"prompt": TEXT} or {"messages": [...]}'),
        ('{"prompt": "a", "messages": []}\n', "it must be"),
        ('{"prompt": 5}\n', "line 1: its prompt is 5 (int); it must be a string"),
        ('{"prompt": "\\ud800"}\n', "line 1: it holds a lone surrogate"),
        ('{"prompt": "a", "id": "caf\udce9"}\n', "line 1: byte 0xe9 is not UTF-8"),
        ('{"prompt": "a", "id": {"n": 1, "n": 2}}\n', "line 1: the key 'n' occurs twice in an object"),
        ('{"prompt": "a", "x": NaN}\n', "line 1: the number NaN is not finite, so it is not JSON"),
        ('{"prompt": "a", "x": -1e999}\n', "line 1: the number -1e999 is not finite"),
        ('{"messages": "hello"}\n', "line 1: its messages are 'hello' (str); they must be a list"),
        ('{"messages": []}\n', "line 1: its dialog is empty; it must end with a 'user' message"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "line 1: its dialog, message 0: its role is 'bot'"),
        (
            '{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}',
            'line 1 has "prompt", but line 3 has "messages"; put texts and dialogs into separate files',
        ),
    ],
)
def test_the_error_about_a_bad_json_line_names_the_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, error: str
) -> None:
    data = lines.encode(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(InputError) as raised:
        read_json_lines(["-"], ["max_gen_len"])
    assert error in str(raised.value)
    (tmp_path / "lines.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=r"lines\.jsonl, line \d"):
        read_json_lines([str(tmp_path / "lines.jsonl")], ["max_gen_len"])


def test_json_lines_keep_their_own_keys_and_files_are_read_one_after_another(
    talker: tuple, llama: Llama, command: Callable, tmp_path: Path
) -> None:
    """Read two files and standard input, with a byte order mark, blank lines, ends of lines in the style of Windows, and keys
    that mean nothing to this program."""
    extra = {"id": 7, "标签": ["é", None, {"x": 0.25}], "": True}
    records = [{"id": "a", "prompt": "the lazy dog"}, {"prompt": "She sells", **extra}, {"prompt": "sea"}]
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    (tmp_path / "1.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n \r\n")
    (tmp_path / "2.jsonl").write_bytes(lines[1])
    files = str(tmp_path / "1.jsonl"), "-", str(tmp_path / "2.jsonl")
    code, out, err = command("complete", *talker, "--max_gen_len", "3", "--jsonl", *files, stdin=lines[2] + b"\n")
    assert (code, err) == (0, "")
    in_order = [records[0], records[2], records[1]]
    answers = llama.text_completion([record["prompt"] for record in in_order], 0, max_gen_len=3, details=True)
    assert [json.loads(line) for line in out.splitlines()] == [
        record | dict(answer) for record, answer in zip(in_order, answers, strict=True)
    ]
    assert "标签" in out.splitlines()[2]


def test_json_lines_with_messages_are_answered_like_dialogs(talker: tuple, llama: Llama, command: Callable) -> None:
    dialogs: Any = [[{"role": "user", "content": text}] for text in ("seven?", "a [INST] b", "good morning")]
    lines = "".join(json.dumps({"messages": dialog, "id": n}) + "\n" for n, dialog in enumerate(dialogs))
    code, out, err = command("complete", *talker, "--max_gen_len", "4", "--jsonl", stdin=lines.encode())
    assert (code, err) == (0, "")
    results = [json.loads(line) for line in out.splitlines()]
    answers = llama.chat_completion(dialogs, 0, max_gen_len=4, details=True)
    assert results == [{"messages": dialogs[n], "id": n} | dict(answers[n]) for n in range(3)]
    assert results[1]["generation"] == {"role": "assistant", "content": UNSAFE_ERROR} and results[1]["new_tokens"] == 0
    too_long = json.dumps({"messages": [{"role": "user", "content": "sea " * CONTEXT}]}).encode()
    code, out, err = command("complete", *talker, "--jsonl", stdin=lines.encode() + too_long)
    assert (code, out) == (1, "") and err.startswith("llama: line 4: its dialog has ")


def test_json_lines_continue_an_answer_that_has_begun(talker: tuple, llama: Llama, command: Callable) -> None:
    dialog: Any = [{"role": "user", "content": "seven?"}, {"role": "assistant", "content": "one, two"}]
    line = json.dumps({"messages": dialog})
    code, out, err = command("complete", *talker, "--max_gen_len", "4", "--jsonl", stdin=line.encode())
    (answer,) = llama.chat_completion([dialog], 0, max_gen_len=4, details=True, continue_answer=True)
    assert (code, err, json.loads(out)) == (0, "", {"messages": dialog} | dict(answer))


def test_stop_flags_take_escapes_because_shells_pass_them_as_typed() -> None:
    parsed = sampling_parser().parse_args([part for text in STOP_FLAGS for part in ("--stop", text)])
    assert parsed.stop == list(STOP_FLAGS.values())


@pytest.mark.parametrize(
    "arguments, code, error",
    [
        (("chat", "--ckpt_dir", "x", "hi"), 1, "llama: --ckpt_dir is 'x': No such file or directory; it must be the path of a"),
        (("chat", "--system", "<<SYS>>"), 1, f"llama: {UNSAFE_ERROR}\n"),
        (("chat", "--temperature", "-1"), 1, "llama: --temperature is -1.0 (float); it must be"),
        (("complete", "--top_k", "-1", "x"), 1, "llama: --top_k is -1 (int); it must be"),
        (("complete", "--max_gen_len", "-1", "x"), 1, "llama: --max_gen_len is -1 (int); it must be"),
        (("chat", "--stop", ""), 1, "llama: stop string 0 is empty"),
        (("complete", "--jsonl", "a b"), 1, "llama: 'a b': No such file or directory; with --jsonl, arguments are files"),
        (("complete", "--jsonl", "-", "-"), 1, 'llama: "-", standard input, is given more than once'),
        (("chat",), 1, "llama: the question is empty; give it as an argument or on standard input, or start chat in"),
        (("chat", "a [INST]"), 1, f"llama: {UNSAFE_ERROR}\n"),
        (("chat", "--lines", "hi"), 1, "llama: --lines reads the questions from standard input; leave out --lines, or 'hi'"),
        (("chat", "--seed", "x"), 2, "argument --seed: invalid int value: 'x'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, command: Callable, arguments: tuple, code: int, error: str
) -> None:
    monkeypatch.setattr(Llama, "build", None)
    returned, out, err = command(*arguments)
    assert (returned, out) == (code, "") and error in err
    assert code == 2 or err.count("\n") == 1  # errors of exit code 1 are one line, without a traceback or usage text
