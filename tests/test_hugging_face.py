"""Test models in Hugging Face's layout: they compute what Meta's layout of the same weights computes."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import CheckpointError, info, plan, save_packed_file
from llama.checkpoint import layouts
from llama.kernels import pack
from llama.model import ModelArgs, precompute_freqs_cis

from .conftest import SMALL, SMALL_HIDDEN, VOCAB
from .hugging_face import (
    FORMATS,
    HEAD_DIM,
    MODEL,
    build,
    edit_config,
    hugging_face_weights,
    logits,
    write_header,
    write_hugging_face,
    write_safetensors,
    write_with_tokenizer,
)  # fmt: skip
from .support import assert_raises, no_extension, random_weights, run, torchrun, write_shards

WORKER = Path(__file__).with_name("hugging_face.py")


@pytest.fixture
def folder(small: SimpleNamespace, tmp_path: Path) -> Path:
    """Write the small model in Hugging Face's layout, in one file, with its tokenizer."""
    return write_with_tokenizer(small, tmp_path)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("align", [8, 64])
def test_the_original_weights_of_one_rank_stay_in_the_mapped_file(
    small: SimpleNamespace, folder: Path, dtype: torch.dtype, align: int
) -> None:
    """No weight but wq and wk is copied if its values are aligned: to 64 bytes, in 16 bit to 8 bytes."""
    tensors = hugging_face_weights({name: weight.to(dtype) for name, weight in small.weights.items()}, HEAD_DIM)
    write_safetensors(folder / MODEL, tensors, align=64)
    if align == 8:
        contents = (folder / MODEL).read_bytes()
        length = int.from_bytes(contents[:8], "little")
        write_header(folder / MODEL, contents[8 : 8 + length] + b" " * 8, contents[8 + length :])
    files = layouts.open_weights(folder)
    model = build(folder, backend="eager").model
    mapped = {name for name, weight in model.state_dict().items() if f"{MODEL}" in _file_of(weight)}
    stays = align == 64 or dtype != torch.float32
    assert mapped == {name for name in small.weights if stays and not name.endswith(("wq.weight", "wk.weight"))}
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


def test_metas_layout_is_preferred_and_safetensors_to_pickles(small: SimpleNamespace, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    build(folder)
    (folder / MODEL).write_bytes(b"damaged")
    write_shards(folder, small.params, small.weights)
    build(folder)


def test_args_of_metas_models_have_their_defaults() -> None:
    args = ModelArgs(dim=128, n_heads=2)
    assert (args.head_dim, args.rope_scale, args.attention_head_dim) == (64, 1.0, None)
