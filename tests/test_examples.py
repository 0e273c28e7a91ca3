"""The example scripts, a script written for the reference, and the default model paths."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama import CheckpointError, InputError, Llama, resolve_model_paths

from .support import ROOT, run, torchrun

REFERENCE_SCRIPT = """
from typing import List, Optional
import fire
from llama import Llama, Dialog

def main(ckpt_dir: str, tokenizer_path: str, temperature: float = 0.6, top_p: float = 0.9, max_seq_len: int = 128,
         max_gen_len: Optional[int] = None, max_batch_size: int = 4):
    generator = Llama.build(ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, max_seq_len=max_seq_len,
                            max_batch_size=max_batch_size)
    prompts: List[str] = ["黄沙百战穿金甲，"]
    results = generator.text_completion(prompts, max_gen_len=20, temperature=temperature, top_p=top_p)
    for prompt, result in zip(prompts, results):
        print(prompt, ">", repr(result["generation"]))
    dialogs: List[Dialog] = [[{"role": "system", "content": "你是一位诗人"}, {"role": "user", "content": "写"}]]
    for result in generator.chat_completion(dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p):
        print(f"> {result['generation']['role'].capitalize()}: {result['generation']['content']!r}")

if __name__ == "__main__":
    fire.Fire(main)
"""


@pytest.fixture
def flags(small: SimpleNamespace) -> tuple:
    return "--ckpt_dir", small.folder, "--tokenizer_path", small.tokenizer_path, "--temperature", 0


@pytest.mark.parametrize(
    "script, extra, answers", [("example_text_completion.py", (), 4), ("example_chat_completion.py", ("--max_gen_len", 16), 6)]
)
def test_the_examples_print_the_same_on_one_and_on_two_ranks(flags: tuple, script: str, extra: tuple, answers: int) -> None:
    one_rank = run(ROOT / script, *flags, *extra)
    assert one_rank.returncode == 0, one_rank.stderr
    assert one_rank.stdout.count("\n==================================\n") == answers
    assert one_rank.stderr == ""
    if "chat" in script:
        assert "Error: special tags are not allowed as part of the prompt." in one_rank.stdout
    two_ranks = torchrun(2, ROOT / script, *flags, *extra)
    assert two_ranks.stdout == one_rank.stdout, two_ranks.stderr


def test_a_script_for_the_reference_runs_unchanged(flags: tuple, tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(REFERENCE_SCRIPT)
    done = torchrun(1, script, *flags)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("黄沙百战穿金甲， > '") and second.startswith("> Assistant: '")
    assert done.stdout == run(script, *flags).stdout


@pytest.mark.parametrize("script", ["example_text_completion.py", "example_chat_completion.py"])
def test_without_flags_the_demo_model_is_used_and_named_on_stderr(script: str) -> None:
    done = run(ROOT / script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "no ckpt_dir given: using the tiny bundled demo model (see demo/README.md)\n"
    assert done.stdout.count("\n> ") == (4 if "text" in script else 6)


def test_the_tokenizer_is_found_in_the_model_folder_or_its_parent(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(small.folder / "params.json", folder)
    with pytest.raises(CheckpointError, match="in it or in its parent folder; give its path"):
        resolve_model_paths(str(folder))
    for parent in (tmp_path, folder):  # download.sh writes the tokenizer to the parent folder
        shutil.copy(small.tokenizer_path, parent / "tokenizer.model")
        assert resolve_model_paths(str(folder)) == (str(folder), str(parent / "tokenizer.model"))
    (folder / "tokenizer.model").unlink()
    monkeypatch.chdir(folder)
    assert resolve_model_paths(".") == (".", str(tmp_path / "tokenizer.model"))
    with pytest.raises(InputError, match="give both, or neither"):
        resolve_model_paths(None, "tokenizer.model")
    with pytest.raises(CheckpointError, match="ckpt_dir is '5'"):
        Llama.build(*resolve_model_paths(5, small.tokenizer_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("script", ["example_text_completion.py", "example_chat_completion.py"])
def test_invalid_input_prints_one_line_without_a_traceback(script: str, flags: tuple) -> None:
    done = run(ROOT / script, *flags, "--max_seq_len", 0)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("llama: --max_seq_len is 0 (int); it must be") and done.stderr.count("\n") == 1
