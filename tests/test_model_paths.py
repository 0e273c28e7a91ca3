"""Test the errors for a wrong ckpt_dir or tokenizer: the folder is checked first, then params.json, then the tokenizer."""

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama import CheckpointError, InputError, Llama, info, plan, resolve_model_paths
from llama.cli import main as cli

LLAMA_3 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
           "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0}  # fmt: skip


def write(folder: Path, **files: str) -> Path:
    """Write files with the given contents into a folder, and return the folder. `__` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("through", ["build", "resolve_model_paths", "complete"])
@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("missing", "No such file or directory; it must be the path of a model's folder"),
        ("~/missing", "No such file or directory"),
        ("file", "a file, not a folder"),
        ("", "an empty path"),
        ("meta-llama/Llama-2-7b-chat", "if this is a repository on Hugging Face, download its files, and give their folder"),
        ("hugging face", "model_type is None; supported is 'llama'"),
        ("llama 3", "is of Llama 3; supported are Llama 2"),
        ("llama 3.1 below", "it contains a model's folder; give llama 3.1 below/original as ckpt_dir"),
        ("no tokenizer", "no tokenizer.model in it or in its parent folder; give its path as tokenizer_path"),
    ],
)
def test_a_wrong_ckpt_dir_without_a_tokenizer_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str, error: str, through: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, file="")
    write(tmp_path / "hugging face", config__json="{}", model__safetensors="", tokenizer__json="{}")
    write(tmp_path / "llama 3", params__json=json.dumps(LLAMA_3))
    write(tmp_path / "llama 3.1 below" / "original", params__json=json.dumps(LLAMA_3 | {"use_scaled_rope": True}))
    write(tmp_path / "llama 3.1 below", config__json="{}")
    write(tmp_path / "no tokenizer", params__json=json.dumps({"dim": 64, "n_layers": 1, "n_heads": 2}))
    if through == "complete":
        assert cli.main(["complete", "--ckpt_dir", case, "hi"]) == 1
        assert error in capsys.readouterr().err.replace("--", "")  # arguments are written as flags
        return
    build = {"build": Llama.build, "resolve_model_paths": resolve_model_paths}
    with pytest.raises(CheckpointError) as caught:
        build[through](case)
    assert error in str(caught.value)


def test_a_tilde_is_the_home_folder_in_every_path(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(small.folder, tmp_path / "model")
    shutil.copy(small.tokenizer_path, tmp_path / "tokenizer.model")
    Llama.build("~/model", max_seq_len=16, max_batch_size=1, device="cpu")
    Llama.build("~/model", "~/tokenizer.model", max_seq_len=16, max_batch_size=1, device="cpu")
    assert resolve_model_paths("~/model") == ("~/model", str(tmp_path / "tokenizer.model"))
    assert "~/model" in plan(ckpt_dir="~/model") and "decode" in info("~/model")


def test_a_link_to_a_model_finds_the_tokenizer_beside_the_model(small: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(small.folder, tmp_path / "models" / "model")
    shutil.copy(small.tokenizer_path, tmp_path / "models" / "tokenizer.model")
    (tmp_path / "link").symlink_to(tmp_path / "models" / "model")
    assert resolve_model_paths(tmp_path / "link")[1] == str(tmp_path / "models" / "tokenizer.model")


def test_a_tokenizer_of_llama_3_is_named_as_such(small: SimpleNamespace, tmp_path: Path) -> None:
    lines = b"".join(base64.b64encode(bytes([i % 256, i // 256])) + f" {i}\n".encode() for i in range(500))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(lines)
    with pytest.raises(CheckpointError, match="it is Llama 3's tokenizer, and Llama 2's models need their own"):
        Llama.build(small.folder, path)


@pytest.mark.parametrize(("short", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_dtype_has_a_short_name(small: SimpleNamespace, short: str, dtype: str) -> None:
    model = Llama.build(small.folder, small.tokenizer_path, 16, 1, device="cpu", dtype=short).model
    assert str(next(model.parameters()).dtype) == f"torch.{dtype}"
    with pytest.raises(InputError, match="use quantize='int8'"):
        Llama.build(small.folder, small.tokenizer_path, 16, 1, device="cpu", dtype="int8")
    with pytest.raises(InputError, match="dtype is 'bf17'"):
        Llama.build(small.folder, small.tokenizer_path, 16, 1, device="cpu", dtype="bf17")
