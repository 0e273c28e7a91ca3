"""Test models in Hugging Face's layout: they compute what Meta's layout of the same weights computes, or raise one error."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, InputError, Llama, convert_checkpoint, info, plan, save_packed_file
from llama.checkpoint import convert, layouts, safetensors_file
from llama.cli.main import main
from llama.kernels import pack
from llama.model import ModelArgs, precompute_freqs_cis

from .conftest import SMALL, SMALL_HIDDEN, VOCAB
from .hugging_face import (
    FORMATS,
    hugging_face_weights,
    logits,
    write_header,
    write_hugging_face,
    write_safetensors,
)  # fmt: skip
from .support import assert_raises, no_extension, random_weights, run, torchrun, write_shards

WORKER = Path(__file__).with_name("hugging_face.py")
MODEL = "model.safetensors"
HEAD_DIM = SMALL["dim"] // SMALL["n_heads"]  # type: ignore[operator]


@pytest.fixture
def folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write the small model in Hugging Face's layout, in one file, with its tokenizer."""
    shutil.copy(small.tokenizer_path, tmp_path / "tokenizer.model")
    return write_hugging_face(tmp_path / "hf", small.params, small.weights)


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(folder, **{"max_seq_len": 32, "max_batch_size": 2, "device": "cpu"} | options)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- the same results as from Meta's layout ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_files", "suffix"), [(1, "safetensors"), (3, "safetensors"), (1, "bin"), (3, "bin")])
def test_every_kind_of_file_gives_the_weights_of_metas_layout(
    small: SimpleNamespace, tmp_path: Path, dtype: torch.dtype, n_files: int, suffix: str
) -> None:
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    folder = write_hugging_face(tmp_path, small.params, weights, n_files, suffix)
    model = build(folder, tokenizer_path=small.tokenizer_path).model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert model.params.ffn_width == SMALL_HIDDEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("compiled", [True, False])
def test_logits_are_bitwise_those_of_metas_layout(
    small: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    quantize: str | None,
    compiled: bool,
) -> None:
    if not compiled:
        monkeypatch.setattr(pack, "status", no_extension)
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    metas = write_shards(tmp_path / "meta", small.params, weights)
    theirs = write_hugging_face(tmp_path / "hf", small.params, weights, 2)
    for options in ({}, {"backend": "eager"}):
        ours, expected = (logits(f, small.tokenizer_path, quantize=quantize, **options) for f in (theirs, metas))
        assert torch.equal(ours, expected)


def test_ranks_compute_bitwise_what_they_compute_from_metas_layout(
    small: SimpleNamespace, tmp_path: Path, tokenizer_path: Path
) -> None:
    metas = write_shards(tmp_path / "meta", small.params, small.weights, 2)
    theirs = write_hugging_face(tmp_path / "hf", small.params, small.weights, 2)
    results = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.pt"
        arguments = WORKER, out, tokenizer_path, metas, theirs
        done = run(*arguments) if ranks == 1 else torchrun(ranks, *arguments)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out))
        for format in FORMATS:
            assert torch.equal(results[-1][str(theirs), format], results[-1][str(metas), format]), (ranks, format)
    assert (results[0][str(theirs), None] - results[1][str(theirs), None]).abs().max() < 1e-4


@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("hidden", [96, 170, 256])
def test_numbers_of_heads_and_widths_of_the_feed_forward(
    tmp_path: Path, tokenizer_path: Path, kv_heads: int, hidden: int
) -> None:
    """The widths are smaller than, equal to and larger than two thirds of four times dim, from which Meta computes them."""
    params = SMALL | {"n_kv_heads": kv_heads}
    weights = random_weights(params, VOCAB, hidden)
    model = build(write_hugging_face(tmp_path, params, weights), tokenizer_path=tokenizer_path).model
    assert model.params.ffn_width == hidden
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_a_tied_output_layer_is_the_embedding(small: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    weights = small.weights | {"output.weight": small.weights["tok_embeddings.weight"]}
    expected = logits(write_shards(tmp_path / "meta", small.params, weights), small.tokenizer_path)
    for tied in ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        theirs = write_hugging_face(tmp_path / str(tied), small.params, weights, **tied)
        assert torch.equal(logits(theirs, small.tokenizer_path), expected)
    for quantize in ("int8", "int4"):
        assert logits(tmp_path / "{'tie_word_embeddings': True}", small.tokenizer_path, quantize=quantize).isfinite().all()
    edit_config(folder, tie_word_embeddings=True)
    assert_raises(lambda: build(folder), CheckpointError, "tie_word_embeddings", "lm_head.weight differs")


def test_a_head_width_of_its_own_computes_what_the_formulas_say(tmp_path: Path, tokenizer_path: Path) -> None:
    """A head of 16 values where dim / n_heads is 8. Every backend is compared with the model, whose shapes are checked."""
    weights = random_weights(SMALL, VOCAB, SMALL_HIDDEN)
    g = torch.Generator().manual_seed(5)
    for i in range(2):
        for name, rows, columns in (("wq", 128, 64), ("wk", 64, 64), ("wv", 64, 64), ("wo", 64, 128)):
            weights[f"layers.{i}.attention.{name}.weight"] = torch.randn(rows, columns, generator=g) * columns**-0.5
    folder = write_hugging_face(tmp_path, SMALL, weights, head_dim=16)
    expected = logits(folder, tokenizer_path, backend="eager")
    model = build(folder, tokenizer_path=tokenizer_path).model
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.params.head_dim == 16 and model.freqs_cis.shape == (64, 8)
    torch.testing.assert_close(logits(folder, tokenizer_path), expected, atol=1e-4, rtol=0)
    for quantize in ("int8", "int4"):
        assert logits(folder, tokenizer_path, quantize=quantize).isfinite().all()
    assert "dim 64" in info(folder) and "weights, on each rank" in plan(ckpt_dir=folder)


def test_resized_vocabularies_have_rows_that_are_never_generated(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(SMALL, VOCAB + 3, SMALL_HIDDEN)
    build(write_hugging_face(tmp_path, SMALL, weights), tokenizer_path=tokenizer_path)
    assert "tokens from 384 on are never generated" in capsys.readouterr().err


def test_values_that_are_not_aligned_are_read(small: SimpleNamespace, folder: Path) -> None:
    """Old versions of safetensors did not pad the header."""
    tensors = hugging_face_weights(small.weights, HEAD_DIM)
    for pad in range(4):
        write_safetensors(folder / MODEL, tensors, {"pad": "x" * pad}, align=1)
        model = build(folder).model
        assert all(torch.equal(weight, small.weights[name]) for name, weight in model.state_dict().items())
        (folder / MODEL).unlink()


def test_rotary_frequencies_in_the_files_are_ignored(small: SimpleNamespace, folder: Path) -> None:
    tensors = hugging_face_weights(small.weights, HEAD_DIM)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 9.0)
    write_safetensors(folder / MODEL, tensors)
    assert torch.equal(build(folder).model.norm.weight, small.weights["norm.weight"])


def test_the_original_weights_of_one_rank_stay_in_the_mapped_file(small: SimpleNamespace, folder: Path) -> None:
    """No weight but wq and wk is copied if its values are aligned. The estimate before loading knows this."""
    write_safetensors(folder / MODEL, hugging_face_weights(small.weights, HEAD_DIM), align=64)
    files = layouts.open_weights(folder)
    model = build(folder, backend="eager").model
    mapped = {name for name, weight in model.state_dict().items() if f"{MODEL}" in _file_of(weight)}
    assert mapped == {name for name in small.weights if not name.endswith(("wq.weight", "wk.weight"))}
    assert files.is_in_metas_order("layers.0.attention.wv.weight") and not files.is_in_metas_order(
        "layers.0.attention.wk.weight"
    )


def _file_of(weight: torch.Tensor) -> str:
    """Return the name of the file that is mapped where a tensor has its values."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= weight.data_ptr() < last:
            return line
    return ""


# --- rotary embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_linear_scaling_divides_all_angles(folder: Path, key: str, type_key: str) -> None:
    edit_config(folder, **{"rope_theta": 5000.0, key: {type_key: "linear", "factor": 4.0}})
    expected = precompute_freqs_cis(HEAD_DIM, 16, 5000.0)
    torch.testing.assert_close(build(folder).model.freqs_cis[::4], expected, atol=1e-5, rtol=0)


def test_the_theta_of_newer_files_is_read(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 777.0}, rope_theta=None)
    assert build(folder).model.params.rope_theta == 777


def test_dynamic_scaling_is_exact_up_to_its_length_and_refused_beyond(folder: Path) -> None:
    edit_config(folder, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=24)
    assert torch.equal(build(folder, max_seq_len=24).model.freqs_cis, precompute_freqs_cis(HEAD_DIM, 48))
    assert_raises(lambda: build(folder, max_seq_len=25), CheckpointError, "'dynamic'", "24", "max_seq_len is 25")


def test_a_context_longer_than_that_of_the_training_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, max_position_embeddings=24)
    build(folder, max_seq_len=24)
    assert "max_position_embeddings" not in capsys.readouterr().err
    build(folder)
    assert "max_seq_len is 32, but max_position_embeddings" in capsys.readouterr().err


# --- other commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_packed_file_of_such_a_folder_gives_the_same_logits(
    small: SimpleNamespace, tmp_path: Path, quantize: str, suffix: str
) -> None:
    folder = write_hugging_face(tmp_path, small.params, small.weights, 2, suffix)
    expected = logits(folder, small.tokenizer_path, quantize=quantize)
    assert save_packed_file(folder, quantize).name == f"{quantize}.safetensors"
    assert torch.equal(logits(folder, small.tokenizer_path, quantize=quantize), expected)
    other = write_hugging_face(tmp_path / "other", small.params, random_weights(SMALL, VOCAB, SMALL_HIDDEN, 1), 2, suffix)
    shutil.copy(folder / f"{quantize}.safetensors", other)
    assert_raises(
        lambda: logits(other, small.tokenizer_path, quantize=quantize), CheckpointError, "made from other weights than"
    )
    for path in [*folder.glob("*model-*"), *folder.glob("*.index.json")]:
        path.unlink()
    assert torch.equal(logits(folder, small.tokenizer_path, quantize=quantize), expected)
    assert_raises(lambda: logits(folder, small.tokenizer_path), CheckpointError, f"build with quantize='{quantize}'")


def test_info_and_plan_describe_such_a_folder(small: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    metas = write_shards(tmp_path / "meta", small.params, small.weights)
    assert info(folder) == info(metas)
    assert plan(ckpt_dir=folder).split("\n")[1:] == plan(ckpt_dir=metas).split("\n")[1:]


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


def test_adapters_are_refused(folder: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
        (folder / name).touch()
    for ckpt_dir in (adapter, folder):
        build = lambda: Llama.build(ckpt_dir, small.tokenizer_path, device="cpu")  # noqa: B023, E731
        assert_raises(build, CheckpointError, str(ckpt_dir), "adapter_config.json", "merge_and_unload()")


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
INDEX = "model.safetensors.index.json"


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


def test_metas_layout_is_preferred_and_safetensors_to_pickles(small: SimpleNamespace, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    build(folder)
    (folder / MODEL).write_bytes(b"damaged")
    write_shards(folder, small.params, small.weights)
    build(folder)


def test_args_of_metas_models_have_their_defaults() -> None:
    args = ModelArgs(dim=128, n_heads=2)
    assert (args.head_dim, args.rope_scale, args.attention_head_dim) == (64, 1.0, None)


# --- convert -----------------------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each file of a folder, by the file's name."""
    files = {path.name: torch.load(path) for path in folder.glob("*.pth")}
    return files | {path.name: safetensors_file.map_safetensors(path)[1] for path in folder.glob("*.safetensors")}


def assert_same_files(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys() and first
    for name, tensors in first.items():
        assert tensors.keys() - {"rope.freqs"} == second[name].keys() - {"rope.freqs"}
        for key, tensor in tensors.items():
            same = key == "rope.freqs" or torch.equal(tensor, second[name][key])
            assert same and (key == "rope.freqs" or tensor.dtype == second[name][key].dtype), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 2])
def test_converting_there_and_back_gives_the_same_bits(
    small: SimpleNamespace, tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    weights = {name: w.to(dtype) for name, w in small.weights.items()}
    metas = write_shards(tmp_path / "meta", small.params, weights, shards)
    shutil.copy(small.tokenizer_path, metas / "tokenizer.model")
    theirs = convert_checkpoint(metas, tmp_path / "hf", "hf", shards)
    names = {path.name for path in theirs.iterdir()}
    expected = {MODEL} if shards == 1 else {INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert names == expected | {"config.json", "tokenizer.model", "tokenizer_config.json"}
    back = convert_checkpoint(theirs, tmp_path / "back", "meta", shards)
    assert_same_files(back, metas)
    assert_same_files(convert_checkpoint(back, tmp_path / "again", "hf", shards), theirs)
    stored = {key: w for tensors in tensors_of(theirs).values() for key, w in tensors.items()}
    assert all(torch.equal(w, stored[key]) for key, w in hugging_face_weights(weights, HEAD_DIM).items())
    for folder in (theirs, back):
        assert torch.equal(logits(folder, folder / "tokenizer.model"), logits(metas, small.tokenizer_path))
    checksums = dict(reversed(line.split()) for line in (back / "checklist.chk").read_text().splitlines())
    for name in ("params.json", "consolidated.00.pth"):
        assert checksums[name] == hashlib.md5((back / name).read_bytes()).hexdigest()


def test_shards_are_converted_to_another_number_of_shards(small: SimpleNamespace, tmp_path: Path) -> None:
    one, four = (write_shards(tmp_path / f"{n}", small.params, small.weights, n) for n in (1, 4))
    assert_same_files(convert_checkpoint(one, tmp_path / "to four", "meta", 4), four)
    assert_same_files(convert_checkpoint(four, tmp_path / "to one", "meta"), one)


def test_a_folder_of_hugging_face_keeps_its_settings(folder: Path, small: SimpleNamespace, tmp_path: Path) -> None:
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    new = convert_checkpoint(folder, tmp_path / "new", "hf", 2)
    assert (new / "config.json").read_text() == (folder / "config.json").read_text()
    assert (new / "generation_config.json").is_file()
    assert torch.equal(logits(new, small.tokenizer_path), logits(folder, small.tokenizer_path))


def test_convert_refuses_what_it_cannot_do_and_leaves_nothing(
    folder: Path, small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, full = tmp_path / "new", tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    before = sorted(tmp_path.iterdir())
    for arguments, error, part in (
        ((folder, full, "meta"), CheckpointError, "exists already"),
        ((folder, folder, "meta"), CheckpointError, "exists already"),
        ((folder, new, "gguf"), InputError, "layout is 'gguf'"),
        ((folder, new, "meta", 0), InputError, "shards is 0"),
        ((folder, new, "meta", 3), InputError, "can be cut into 1, 2, 4 shards"),
        ((folder, new, "hf", 3), InputError, "the model has 2 layers"),
        ((folder, 3, "hf"), CheckpointError, "target is 3 (int)"),
        ((full, new, "hf"), CheckpointError, "no params.json"),
    ):
        assert_raises(lambda: convert_checkpoint(*arguments), error, part)  # type: ignore[arg-type] # noqa: B023
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    assert_raises(lambda: convert_checkpoint(folder, new, "meta"), CheckpointError, "rope_scaling by 2.0", "keep Hugging")
    edit_config(folder, rope_scaling=None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert_raises(lambda: convert_checkpoint(folder, new, "meta"), CheckpointError, "make room")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_weights_that_are_not_finite_or_change_are_not_converted(
    folder: Path, small: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    tensors = hugging_face_weights(small.weights, HEAD_DIM)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][3, 3] = float("inf")
    write_safetensors(folder / "new", tensors)
    (folder / "new").replace(folder / MODEL)
    assert_raises(lambda: convert_checkpoint(folder, tmp_path / "n", layout), CheckpointError, "output.weight contains NaN or")
    check_finite = convert.check_finite

    def touch_and_check(*args: Any) -> None:
        os.utime(folder / MODEL, ns=(0, 5))
        check_finite(*args)

    monkeypatch.setattr(convert, "check_finite", touch_and_check)
    assert_raises(lambda: convert_checkpoint(folder, tmp_path / "n", layout), CheckpointError, "while it was being read")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("n")]


def test_the_command_converts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "new"), "--to", "meta", "--shards", "2"]) == 0
    assert str(tmp_path / "new") in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "params.json").read_text())["n_kv_heads"] == 4
    assert main(["convert", str(folder), str(tmp_path / "new"), "--to", "meta"]) == 1
    assert "exists already" in capsys.readouterr().err
