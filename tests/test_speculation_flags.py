"""The flags that choose what guesses tokens: --speculate prompt and --draft_dir."""

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama import Llama
from llama.cli.main import main

from .hugging_face import write_adapter
from .support import torchrun

PROMPT = "The quick brown fox"


@pytest.fixture
def flags(small: SimpleNamespace) -> list[str]:
    paths = ["--ckpt_dir", str(small.folder), "--tokenizer_path", str(small.tokenizer_path)]
    return [*paths, "--temperature", "0", "--device", "cpu", "--max_seq_len", "64"]


@pytest.fixture
def draft_dir(small: SimpleNamespace, tmp_path: Path) -> Path:
    return shutil.copytree(small.folder, tmp_path / "draft")


@pytest.fixture(autouse=True)
def no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Llama, dict[str, Any]]]:
    """Return a list of what is built, in order, with the keyword arguments."""
    built, build = [], Llama.build

    def record(*args: Any, **options: Any) -> Llama:
        built.append((build(*args, **options), options))
        return built[-1][0]

    monkeypatch.setattr(Llama, "build", record)
    return built


def test_the_flags_choose_what_guesses_and_change_no_answer(
    flags: list[str], draft_dir: Path, built: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["complete", *flags, PROMPT]) == 0
    want = capsys.readouterr().out
    for given, kind in ((["--speculate", "prompt"], "prompt"), (["--draft-dir", str(draft_dir)], "draft")):
        built.clear()
        assert main(["complete", *flags, *given, PROMPT]) == 0
        assert capsys.readouterr().out == want
        assert built[-1][0].speculate == kind
    (draft, _), (llama, _) = built
    assert llama.draft is draft and draft.draft is None


def test_the_draft_is_built_like_its_model(
    flags: list[str], draft_dir: Path, built: list, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--dtype", "float32", "--quantize", "int8", "--max_batch_size", "2", "--seed", "5"]
    assert main(["complete", *flags, *asked, "--draft_dir", str(draft_dir), PROMPT, PROMPT, PROMPT]) == 0
    (draft, draft_options), (llama, options) = built
    assert draft_options == {name: value for name, value in options.items() if name not in ("adapter", "speculate", "draft")}
    assert draft_options["quantize"] == "int8" and draft_options["dtype"] == "float32"
    for name, size in (("max_seq_len", 64), ("max_batch_size", 2)):
        assert getattr(draft.model.params, name) == getattr(llama.model.params, name) == size


def test_json_lines_get_the_numbers_of_guesses(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["complete", *flags, "--speculate", "prompt", "--max_gen_len", "5", "--jsonl", str(tmp_path / "prompts")]
    (tmp_path / "prompts").write_text(json.dumps({"prompt": PROMPT}))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out).keys() >= {"generation", "guessed_tokens", "accepted_tokens"}
    for key, error in (("guessed_tokens", "a key that the answer adds"), ("speculate", "give --speculate, or rename the key")):
        (tmp_path / "prompts").write_text(json.dumps({"prompt": PROMPT, key: 1}))
        assert main(command) == 1 and error in capsys.readouterr().err


def test_a_draft_guesses_for_chats(flags: list[str], draft_dir: Path, built: list, capsys: pytest.CaptureFixture[str]) -> None:
    chat = ["chat", *flags, "--max_gen_len", "8", "--no_history"]
    assert main([*chat, "hi"]) == main([*chat, "--draft_dir", str(draft_dir), "hi"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and built[-1][0].speculate == "draft"


@pytest.mark.parametrize("command", ["chat", "complete", "serve"])
def test_wrong_flags_are_named_with_the_way_out(
    command: str, flags: list[str], draft_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "serve":
        if importlib.util.find_spec("uvicorn") is None:
            pytest.skip("the server needs the extra serve")
        flags = [flag for flag in flags if flag not in ("--temperature", "0")] + ["--port", "0"]
    question = [] if command == "serve" else ["hi"]
    missing = draft_dir.parent / "ckpt_dir"
    for given, error in (
        (["--speculate", "prompt", "--draft_dir", str(draft_dir)], "--speculate prompt and --draft_dir are two ways"),
        (["--draft_dir", str(missing)], f"--draft_dir is '{missing}': No such file or directory"),
        (
            ["--draft_dir", str(draft_dir.parent)],
            f"{draft_dir.parent}: no params.json; it contains a model's folder; give {draft_dir} as --draft_dir",
        ),
        (["--draft_dir", str(draft_dir), "--dtype", "int3"], "--dtype is 'int3'"),
    ):
        assert main([command, *flags, *given, *question]) == 1
        assert capsys.readouterr().err.startswith("llama: " + error)
    with pytest.raises(SystemExit) as caught:
        main([command, *flags, "--speculate", "fast", *question])
    assert caught.value.code == 2 and "--speculate: invalid choice: 'fast'" in capsys.readouterr().err


def test_an_adapter_is_no_draft(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "a", {})
    assert main(["complete", *flags, "--draft_dir", str(tmp_path / "a"), PROMPT]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"llama: --draft_dir is '{tmp_path / 'a'}': it contains an adapter, not a model: merge it into")
    assert error.endswith("with python -m llama convert --adapter, and give the result as --draft_dir\n")


def test_a_wrong_file_of_the_draft_is_told(flags: list[str], draft_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (draft_dir / "consolidated.00.pth").write_bytes(b"")
    assert main(["complete", *flags, "--draft_dir", str(draft_dir), PROMPT]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llama: the draft in --draft_dir: ") and "consolidated.00.pth" in error


def test_two_ranks_speculate(flags: list[str], draft_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*flags, "--max_gen_len", "20"]
    assert main(["complete", *flags, PROMPT]) == 0
    done = torchrun(2, "-m", "llama", "complete", *flags, "--draft_dir", draft_dir, PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out
