"""Test LoRA adapters: a model built with one computes what the merged weights compute, and every other adapter is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, Llama, convert_checkpoint, save_packed_file
from llama.checkpoint import adapter as adapters
from llama.checkpoint import layouts, loading
from llama.cli.main import main

from .conftest import SMALL, SMALL_HIDDEN, VOCAB
from .hugging_face import (
    FORMATS,
    HEAD_DIM,
    Tensors,
    hugging_face_weights,
    logits,
    random_pairs,
    write_adapter,
    write_hugging_face,
    write_safetensors,
)
from .support import assert_raises, random_weights, torchrun, write_shards

WORKER = Path(__file__).with_name("hugging_face.py")
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj")  # fmt: skip
ALL = [f"model.layers.{layer}.{matrix}" for layer in (0, 1) for matrix in MATRICES]


def merge(weights: Tensors, tensors: Tensors, scale: float | Callable[[str], float], dtype: torch.dtype) -> Tensors:
    """Return weights by Hugging Face's names with the pairs of an adapter merged in float32, and rounded once."""
    merged = dict(weights)
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            factor = scale if isinstance(scale, float) else scale(module)
            merged[f"{module}.weight"] = (weights[f"{module}.weight"].float() + b.float() @ a.float() * factor).to(dtype)
    return merged


def write_model(folder: Path, weights: Tensors) -> Path:
    """Write the small model with these weights, by Hugging Face's names."""
    write_hugging_face(folder, SMALL, random_weights(SMALL, VOCAB, SMALL_HIDDEN))
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bases(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Write the small model in both layouts, and an adapter for all matrices of its layers; return the merged model, too."""
    root = tmp_path_factory.mktemp("adapters")
    weights = hugging_face_weights(small.weights, HEAD_DIM)
    tensors = random_pairs(ALL, weights)
    return SimpleNamespace(
        hf=write_hugging_face(root / "hf", small.params, small.weights, 3),
        meta=write_shards(root / "meta", small.params, small.weights, 2),
        adapter=write_adapter(root / "adapter", tensors),
        merged=write_model(root / "merged", merge(weights, tensors, 1.5, torch.float32)),
        weights=weights,
        tensors=tensors,
        tokenizer=small.tokenizer_path,
    )


def weights_of(ckpt_dir: Path, tokenizer_path: Path, **options: Any) -> Tensors:
    """Return the weights of a model that is built with plain tensors, by Hugging Face's names."""
    llama = Llama.build(ckpt_dir, tokenizer_path, 32, 2, device="cpu", backend="eager", **options)
    return hugging_face_weights(llama.model.state_dict(), HEAD_DIM)


# --- what is merged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", FORMATS)
def test_logits_are_bitwise_those_of_the_merged_weights(
    bases: SimpleNamespace, small: SimpleNamespace, tmp_path: Path, dtype: torch.dtype, quantize: str | None
) -> None:
    """The base is in both layouts; merging comes before quantizing, and rounds once."""
    stored = {name: weight.to(dtype) for name, weight in small.weights.items()}
    theirs = write_hugging_face(tmp_path / "hf", small.params, stored, 2)
    metas = write_shards(tmp_path / "meta", small.params, stored, 2)
    merged = merge(hugging_face_weights(stored, HEAD_DIM), bases.tensors, 1.5, dtype)
    expected = write_model(tmp_path / "merged", merged)
    for options in ({}, {"backend": "eager"}):
        want = logits(expected, bases.tokenizer, quantize=quantize, **options)
        for base in (theirs, metas):
            assert torch.equal(logits(base, bases.tokenizer, quantize=quantize, adapter=bases.adapter, **options), want)


def test_ranks_compute_what_they_compute_from_the_merged_weights(bases: SimpleNamespace, tmp_path: Path) -> None:
    adapted = [f"{base}::{bases.adapter}" for base in (bases.hf, bases.meta)]
    done = torchrun(2, WORKER, tmp_path / "out.pt", bases.tokenizer, bases.merged, *adapted)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "out.pt")
    for base in adapted:
        for format in FORMATS:
            assert torch.allclose(results[base, format], results[str(bases.merged), format], rtol=0, atol=1e-5), (base, format)
    assert torch.allclose(results[adapted[0], None], logits(bases.merged, bases.tokenizer), rtol=0, atol=1e-4)


def test_only_the_chosen_dtype_is_rounded_to(bases: SimpleNamespace, small: SimpleNamespace, tmp_path: Path) -> None:
    """With dtype="float32", the merged values of a model in bfloat16 are not rounded."""
    stored = {name: weight.bfloat16() for name, weight in small.weights.items()}
    base = write_shards(tmp_path, small.params, stored)
    want = merge(hugging_face_weights(stored, HEAD_DIM), bases.tensors, 1.5, torch.float32)
    found = weights_of(base, bases.tokenizer, adapter=bases.adapter, dtype="float32")
    assert all(torch.equal(found[name], weight.float()) for name, weight in want.items())


def test_ranks_and_alphas_of_single_modules(bases: SimpleNamespace, tmp_path: Path) -> None:
    modules = [m for m in ALL if m.endswith(("q_proj", "down_proj"))]
    rank = {m: 2 if m == "model.layers.1.self_attn.q_proj" else 3 if m.endswith("down_proj") else 4 for m in modules}
    tensors = random_pairs(modules, bases.weights, rank)
    patterns = {
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 2, r"mlp\.down_proj": 3},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 9, "q_proj": 1.5},
    }
    for use_rslora in (False, True):
        folder = write_adapter(tmp_path / "adapter", tensors, use_rslora=use_rslora, **patterns)

        def scale(module: str) -> float:
            alpha = 1.5 if module.endswith("q_proj") else 9 if ".0." in module else 6
            return alpha / (rank[module] ** 0.5 if use_rslora else rank[module])  # noqa: B023

        found = weights_of(bases.meta, bases.tokenizer, adapter=folder)
        want = merge(bases.weights, tensors, scale, torch.float32)
        assert all(torch.allclose(found[name], weight, rtol=0, atol=1e-6) for name, weight in want.items())
        (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("modules", "config"),
    [
        (ALL, {"target_modules": "all-linear"}),
        ([ALL[0], ALL[8]], {"target_modules": r"(.*)\.\d+\.self_attn\.(q|k)_proj(a+)+$"}),
        ([ALL[7]], {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ([ALL[7]], {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
        ([ALL[7]], {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        (["lm_head"], {"target_modules": ["lm_head"]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_modules_that_the_config_names_are_merged(
    bases: SimpleNamespace, tmp_path: Path, modules: list[str], config: dict, suffix: str
) -> None:
    tensors = random_pairs(modules, bases.weights)
    folder = write_adapter(tmp_path / "adapter", tensors, suffix, **config)
    found = weights_of(bases.hf, bases.tokenizer, adapter=folder)
    want = merge(bases.weights, tensors, 1.5, torch.float32)
    assert all(torch.equal(found[name], weight) for name, weight in want.items())


def test_whole_weights_replace_the_models_and_an_embedding_has_a_pair(bases: SimpleNamespace, tmp_path: Path) -> None:
    whole = {
        m: torch.rand_like(bases.weights[f"{m}.weight"]) for m in ("lm_head", "model.norm", "model.layers.0.self_attn.k_proj")
    }
    tensors = random_pairs(["model.embed_tokens"], bases.weights)
    saved = {f"base_model.model.{module}.weight": tensor for module, tensor in whole.items()}
    modules = ["lm_head", "model.norm", "layers.0.self_attn.k_proj"]
    config = {"target_modules": ["embed_tokens"], "modules_to_save": modules}
    folder = write_adapter(tmp_path / "adapter", tensors | saved, **config)
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{n}"] for n in "AB")
    assert a.shape == (4, VOCAB) and b.shape == (64, 4)
    want = bases.weights | {f"{module}.weight": tensor for module, tensor in whole.items()}
    want["model.embed_tokens.weight"] = want["model.embed_tokens.weight"] + (b @ a).T * 1.5
    for base in (bases.hf, bases.meta):
        found = weights_of(base, bases.tokenizer, adapter=folder)
        assert all(torch.allclose(found[name], weight, rtol=0, atol=1e-6) for name, weight in want.items())


def test_a_module_to_save_is_named_by_any_end_of_its_name(bases: SimpleNamespace, tmp_path: Path) -> None:
    """PEFT saves the norms of all layers, too, if "norm" is among modules_to_save."""
    names = ["model.norm", *(name.removesuffix(".weight") for name in bases.weights if name.endswith("layernorm.weight"))]
    whole = {f"{name}.weight": torch.rand_like(bases.weights[f"{name}.weight"]) for name in names}
    assert len(whole) > 2
    tensors = random_pairs(["model.layers.0.self_attn.q_proj"], bases.weights)
    saved = {f"base_model.model.{name}": tensor for name, tensor in whole.items()}
    folder = write_adapter(
        tmp_path / "adapter", tensors | saved, target_modules=["layers.0.self_attn.q_proj"], modules_to_save=["norm"]
    )
    found = weights_of(bases.hf, bases.tokenizer, adapter=folder)
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())


def test_whole_embeddings_that_peft_saves_unnamed_are_merged(bases: SimpleNamespace, tmp_path: Path) -> None:
    """PEFT saves the embedding and the output layer beside the pairs if it finds one of them among the targets."""
    tensors = random_pairs(["model.embed_tokens"], bases.weights)
    base = torch.rand_like(bases.weights["model.embed_tokens.weight"])
    saved = {f"base_model.model.{name}": base for name in ("model.embed_tokens.base_layer.weight", "lm_head.weight")}
    folder = write_adapter(tmp_path / "adapter", tensors | saved, target_modules=["embed_tokens"])
    found = weights_of(bases.meta, bases.tokenizer, adapter=folder)
    a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{n}"] for n in "AB")
    assert torch.equal(found["lm_head.weight"], base)
    assert torch.allclose(found["model.embed_tokens.weight"], base + (b @ a).T * 1.5, rtol=0, atol=1e-6)


def test_memory_of_adapted_weights_is_not_counted_as_mapped(bases: SimpleNamespace, small: SimpleNamespace) -> None:
    files = layouts.open_weights(small.folder)
    model = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", backend="eager").model
    arguments = torch.float32, torch.device("cpu"), None, False
    before = loading.bytes_staying_mapped(model, files, *arguments)
    files.adapter = adapters.open_adapter(bases.adapter, model.params, files)
    after = loading.bytes_staying_mapped(model, files, *arguments)
    assert before - after == sum(bases.weights[f"{module}.weight"].nbytes for module in ALL)


# --- commands and packed files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_convert_writes_the_merged_model(bases: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    new = convert_checkpoint(bases.meta, tmp_path / "new", layout, adapter=bases.adapter)
    assert torch.equal(logits(new, bases.tokenizer), logits(bases.merged, bases.tokenizer))
    save_packed_file(new, "int8")
    want = logits(bases.hf, bases.tokenizer, adapter=bases.adapter, quantize="int8")
    assert torch.equal(logits(new, bases.tokenizer, quantize="int8"), want)


def test_a_packed_file_is_not_used_with_an_adapter(
    bases: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bases.hf, tmp_path / "hf")
    save_packed_file(tmp_path / "hf", "int8")
    capsys.readouterr()
    options = {"quantize": "int8", "adapter": bases.adapter}
    assert torch.equal(logits(tmp_path / "hf", bases.tokenizer, **options), logits(bases.hf, bases.tokenizer, **options))
    assert "int8.safetensors is not used, because it contains the weights without the adapter" in capsys.readouterr().err
    for path in tmp_path.glob("hf/model*"):
        path.unlink()
    for quantize in ("int8", None):
        build = lambda: logits(tmp_path / "hf", bases.tokenizer, quantize=quantize, adapter=bases.adapter)  # noqa: B023, E731
        assert_raises(build, CheckpointError, "packed weights only, into which no adapter can be merged")


def test_the_commands_take_an_adapter(bases: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokenizer_path", str(bases.tokenizer), "--max_gen_len", "8", "--temperature", "0", "The"]
    answers = []
    for model in (["--ckpt_dir", str(bases.merged)], ["--ckpt_dir", str(bases.hf), "--adapter", str(bases.adapter)]):
        assert main(["complete", *model, *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    new = tmp_path / "new"
    assert main(["convert", str(bases.hf), str(new), "--to", "hf", "--adapter", str(bases.adapter)]) == 0
    assert torch.equal(logits(new, bases.tokenizer), logits(bases.merged, bases.tokenizer))
