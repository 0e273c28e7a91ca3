"""Test folders in Hugging Face's layout that are refused: other architectures, damaged and hostile files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, plan
from llama.checkpoint import safetensors_file

from .hugging_face import (
    HEAD_DIM,
    INDEX,
    MODEL,
    build,
    hugging_face_weights,
    write_header,
    write_hugging_face,
    write_safetensors,
    write_with_tokenizer,
)  # fmt: skip
from .support import assert_raises


@pytest.fixture
def folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write the small model in Hugging Face's layout, in one file, with its tokenizer."""
    return write_with_tokenizer(small, tmp_path)


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "mistral"}, ("model_type is 'mistral'", "transformers or vLLM")),
        ({"model_type": ...}, ("model_type is None",)),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification", "LlamaForCausalLM")),
        ({"attention_bias": True}, ("attention_bias is True", "biases")),
        ({"mlp_bias": True}, ("mlp_bias is True", "biases")),
        ({"sliding_window": 4096}, ("sliding_window is 4096", "window")),
        ({"hidden_act": "gelu"}, ("hidden_act is 'gelu'",)),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, ("auto_map", "code of its own", "never run")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("'gptq'", "quantize='int8'")),
        ({"quantization_config": {"quant_method": "awq"}}, ("'awq'",)),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("'bitsandbytes'",)),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ("rope_scaling", "'yarn'", "'linear'")),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("'llama3'",)),
        ({"rope_parameters": {"rope_type": "longrope"}}, ("rope_parameters", "'longrope'")),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("a part of each head",)),
        ({"rope_scaling": {"type": "linear"}}, ("factor of linear rope_scaling is None",)),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, ("factor of linear rope_scaling is '4'",)),
        ({"rope_scaling": [1]}, ("rope_scaling is [1] (list)",)),
        ({"rope_scaling": {"type": ["x"]}}, ("type ['x']",)),
        ({"hidden_size": ...}, ("no hidden_size",)),
        ({"hidden_size": -64}, ("hidden_size is -64",)),
        ({"intermediate_size": 1.5}, ("intermediate_size is 1.5",)),
        ({"num_attention_heads": 7}, ("dim=64", "n_heads=7")),
        ({"num_key_value_heads": 3}, ("n_kv_heads=3",)),
        ({"head_dim": 7}, ("head_dim is 7", "even number")),
        ({"rms_norm_eps": "1e-5"}, ("rms_norm_eps",)),
        ({"rope_theta": True}, ("rope_theta is True",)),
        ({"max_position_embeddings": None}, ("max_position_embeddings is None",)),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings is 'yes'",)),
        ({"vocab_size": 128256}, ("is of Llama 3",)),
        ({"vocab_size": 400}, ("embed_tokens.weight' is (384, 64)", "config.json makes (400, 64)")),
        ({"num_hidden_layers": 3}, ("lacks model.layers.2.",)),
        ({"num_hidden_layers": 1}, ("unknown model.layers.1.",)),
        ({"head_dim": 32}, ("q_proj.weight' is (64, 64)", "(256, 64)")),
    ],
)  # fmt: skip
def test_what_is_not_llamas_architecture_is_refused_by_name(
    small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict, parts: tuple[str, ...]
) -> None:
    weights = small.weights
    folder = write_hugging_face(tmp_path, small.params, weights)
    path = folder / "config.json"
    values = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    monkeypatch.setattr("llama.checkpoint.loading.load_weights", lambda *_: pytest.fail("weights were read"))
    assert_raises(lambda: build(folder, tokenizer_path=small.tokenizer_path), CheckpointError, *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.0.self_attn.q_proj.bias", ("q_proj.bias", "no biases")),
        ("model.layers.0.self_attn.q_proj.qweight", ("qweight", "GPTQ, AWQ", "quantize='int8'")),
        ("model.layers.0.mlp.up_proj.weight.absmax", ("absmax", "bitsandbytes")),
        ("score.weight", ("unknown score.weight",)),
    ],
)
def test_tensors_that_llama_does_not_have_are_refused(
    small: SimpleNamespace, folder: Path, name: str, parts: tuple[str, ...]
) -> None:
    write_safetensors(folder / MODEL, hugging_face_weights(small.weights, HEAD_DIM) | {name: torch.ones(3)})
    assert_raises(lambda: build(folder), CheckpointError, *parts)


def test_a_missing_output_layer_is_explained(small: SimpleNamespace, folder: Path) -> None:
    tensors = hugging_face_weights(small.weights, HEAD_DIM)
    del tensors["lm_head.weight"]
    write_safetensors(folder / MODEL, tensors)
    assert_raises(lambda: build(folder), CheckpointError, "lacks lm_head.weight", "set tie_word_embeddings to true")


def test_a_dtype_that_is_not_supported_and_nan_are_refused(small: SimpleNamespace, folder: Path) -> None:
    tensors = hugging_face_weights(small.weights, HEAD_DIM)
    name = "model.layers.1.self_attn.k_proj.weight"
    write_safetensors(folder / MODEL, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    assert_raises(lambda: build(folder), CheckpointError, "is stored as torch.float8_e4m3fn")
    damaged = tensors[name].clone()
    damaged[-1, -1] = float("nan")
    write_safetensors(folder / MODEL, tensors | {name: damaged})
    assert_raises(lambda: build(folder), CheckpointError, "layers.1.attention.wk.weight contains NaN")


def test_a_folder_with_a_model_and_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").touch()
    parts = str(folder), "a model (config.json) and an adapter", "a folder of its own", "delete adapter_config.json"
    assert_raises(lambda: build(folder), CheckpointError, *parts)


def test_a_wrong_tokenizer_json_is_refused(folder: Path) -> None:
    (folder.parent / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")
    assert_raises(lambda: build(folder), CheckpointError, "no tokenizer.json of `tokenizers`", "fetch it again")


# --- hostile files -----------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def set_entry(**values: Any) -> Change:
    return lambda header: header[NORM].update(values)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (set_entry(shape=[-64]), "has the shape [-64]"),
        (set_entry(shape=[-1]), "has the shape [-1]"),
        (set_entry(shape=[2**70]), "has the shape"),
        (set_entry(shape=[2**61, 2**61]), "but has 256 bytes"),
        (set_entry(shape=[1] * 9 + [64]), "has the shape"),
        (set_entry(shape=[64.0]), "has the shape [64.0]"),
        (set_entry(shape=[True, 64]), "has the shape"),
        (set_entry(shape="64"), "has the shape '64'"),
        (set_entry(dtype="F4"), "has the dtype 'F4'"),
        (set_entry(dtype=["F32"]), "has the dtype"),
        (set_entry(data_offsets=[0, 256]), "overlaps another tensor"),
        (set_entry(data_offsets=[-256, 0]), "has the data_offsets"),
        (set_entry(data_offsets=[2**40, 2**40 + 256]), "leaves a hole"),
        (set_entry(data_offsets=[256, 0]), "but has -256 bytes"),
        (set_entry(data_offsets=[0]), "has the data_offsets [0]"),
        (lambda header: header.update({NORM: 3}), "has no dtype, shape and data_offsets"),
        (lambda header: header.pop(EMBEDDING), "leaves a hole"),
        (lambda header: header.update(__metadata__=[1]), "metadata is no object"),
        (lambda header: header.update({"x" * 100_000: {"dtype": "F4", "shape": [], "data_offsets": [0, 0]}}), "dtype 'F4'"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused(folder: Path, change: Change, part: str) -> None:
    data = (folder / MODEL).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    write_header(folder / MODEL, header, data[8 + length :])
    assert_raises(lambda: build(folder), CheckpointError, str(folder / MODEL), part, "fetch it again")
    with pytest.raises(CheckpointError):  # without values, too
        plan(ckpt_dir=folder)


def huge_header(data: bytes) -> bytes:
    return (100 << 20).to_bytes(8, "little") + b"[" * (100 << 20) + data


@pytest.mark.parametrize(
    ("contents", "part"),
    [
        (lambda data: huge_header(data), "its header has 104,857,600 bytes; at most 4,194,304 are read"),
        (lambda data: b"\xff" * 8 + data, "no header, or cut off"),
        (lambda data: data[:-1], "its tensors have"),
        (lambda data: data + b"x", "its tensors have"),
        (lambda data: data[:100], "no header, or cut off"),
        (lambda data: b"", "it is empty"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (lambda data: b"<html>", "the download failed"),
        (lambda data: (400_000).to_bytes(8, "little") + b"[" * 400_000, "nested too deeply"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "no object"),
        (lambda data: (8).to_bytes(8, "little") + b'{"a": \xff}', "no sound safetensors file"),
        (lambda data: (16).to_bytes(8, "little") + b'{"a":1,"a":2}   ', "'a' appears twice"),
    ],
)  # fmt: skip
def test_a_hostile_or_damaged_file_is_refused(folder: Path, contents: Callable[[bytes], bytes], part: str) -> None:
    path = folder / MODEL
    path.write_bytes(contents(path.read_bytes()))
    assert_raises(lambda: build(folder), CheckpointError, str(path), part)


def test_a_header_of_many_equal_names_is_refused_at_once(folder: Path) -> None:
    entry = b'"a":0,'
    text = b"{" + b"".join(b'"%d":0,' % i for i in range(200_000)) + entry * 2 + b'"z":0}'
    write_header(folder / MODEL, text)
    assert_raises(lambda: build(folder), CheckpointError, "'a' appears twice")


@pytest.fixture
def indexed(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write the small model in three files with an index."""
    shutil.copy(small.tokenizer_path, tmp_path / "tokenizer.model")
    return write_hugging_face(tmp_path / "hf", small.params, small.weights, 3)


SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    "place", ["../away.safetensors", "/etc/passwd", "/away.safetensors", "a/b.safetensors", "..", "", "a\\b.safetensors",
              "x\0.safetensors", ".safetensors", "model.bin", "-x" * 500]
)  # fmt: skip
def test_an_index_that_points_outside_of_the_folder_is_refused(indexed: Path, place: str) -> None:
    shutil.copy(indexed / SECOND, indexed.parent / "away.safetensors")
    index = json.loads((indexed / INDEX).read_text())
    index["weight_map"] = {name: place if file == SECOND else file for name, file in index["weight_map"].items()}
    (indexed / INDEX).write_text(json.dumps(index))
    assert_raises(lambda: build(indexed), CheckpointError, INDEX, "no name of a .safetensors file in the folder itself")


@pytest.mark.parametrize("through", ["index", "single file"])
def test_a_link_out_of_the_folder_is_refused_unless_it_is_hugging_faces_own(
    indexed: Path, folder: Path, small: SimpleNamespace, tmp_path: Path, through: str
) -> None:
    ckpt_dir = tmp_path / "model"
    write_hugging_face(ckpt_dir, small.params, small.weights, 3 if through == "index" else 1)
    path = ckpt_dir / (SECOND if through == "index" else MODEL)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    path.rename(tmp_path / "away.safetensors")
    path.symlink_to(tmp_path / "away.safetensors")
    assert_raises(lambda: build(ckpt_dir), CheckpointError, str(path), "outside of the folder", "put the file itself there")
    path.unlink()
    (tmp_path / "away.safetensors").rename(blobs / "0a1b")
    path.symlink_to(blobs / "0a1b")
    assert torch.equal(build(ckpt_dir).model.norm.weight, small.weights["norm.weight"])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not JSON"), ("[]", "no weight_map"), ("{}", "no weight_map"), ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "no weight_map"), ("[" * 100_000, "not JSON"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears twice"),
        (" " * (1 << 23), "longer than 4,194,304 bytes"),
    ],
)  # fmt: skip
def test_an_index_that_is_damaged_is_refused(indexed: Path, text: str, part: str) -> None:
    (indexed / INDEX).write_text(text)
    assert_raises(lambda: build(indexed), CheckpointError, str(indexed / INDEX), part)


def test_a_missing_file_and_files_without_an_index_are_refused(indexed: Path) -> None:
    (indexed / SECOND).unlink()
    assert_raises(lambda: build(indexed), CheckpointError, f"{SECOND} missing", "lists 3 files")
    (indexed / INDEX).unlink()
    assert_raises(lambda: build(indexed), CheckpointError, "no weights in Hugging Face's layout", "index")


def test_tensors_that_are_in_two_files_or_elsewhere_than_the_index_says_are_refused(indexed: Path) -> None:
    first = indexed / "model-00001-of-00003.safetensors"
    tensors = safetensors_file.map_safetensors(first)[1]
    moved = {name: tensor.clone() for name, tensor in safetensors_file.map_safetensors(indexed / SECOND)[1].items()}
    name, tensor = next(iter(tensors.items()))
    write_safetensors(indexed / "new", moved | {name: tensor.clone()})
    (indexed / "new").replace(indexed / SECOND)
    assert_raises(lambda: build(indexed), CheckpointError, name, f"is in {first.name} and in", SECOND)
    moved.pop(other := next(iter(moved)))
    write_safetensors(indexed / "new", moved)
    (indexed / "new").replace(indexed / SECOND)
    assert_raises(lambda: build(indexed), CheckpointError, f"the index places '{other}' in {SECOND}, which lacks it")


class RunsCode:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


@pytest.mark.parametrize("n_files", [1, 3])
def test_a_pickle_that_would_run_code_is_refused(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], n_files: int
) -> None:
    folder = write_hugging_face(tmp_path, small.params, small.weights, n_files, "bin")
    path = sorted(folder.glob("*.bin"))[-1]
    torch.save(torch.load(path) | {"x": RunsCode()}, path)
    assert_raises(lambda: build(folder, tokenizer_path=small.tokenizer_path), CheckpointError, str(path), "it could run code")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", MODEL, INDEX])
def test_a_folder_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if name == INDEX:
        (folder / MODEL).unlink()
    (folder / name).mkdir()
    assert_raises(lambda: build(folder), CheckpointError, str(folder / name), "not a file")
