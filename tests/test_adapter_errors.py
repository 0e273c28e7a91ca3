"""Test adapters that are refused: of other kinds, of other models, damaged and hostile ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import CheckpointError, Llama
from llama.checkpoint import loading

from .conftest import SMALL
from .hugging_face import (
    HEAD_DIM,
    Tensors,
    hugging_face_weights,
    random_pairs,
    write_adapter,
    write_hugging_face,
    write_safetensors,
)
from .support import assert_raises, write_shards

Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.self_attn.v_proj"
NORM, EMBEDDING = "base_model.model.model.norm.weight", "base_model.model.model.embed_tokens"
FILE = "adapter_model.safetensors"
MODULES = [f"model.layers.{layer}.self_attn.{matrix}" for layer in (0, 1) for matrix in ("q_proj", "v_proj")]


@pytest.fixture
def tensors(small: SimpleNamespace) -> Tensors:
    return random_pairs(MODULES, hugging_face_weights(small.weights, HEAD_DIM))


@pytest.fixture
def adapter(tensors: Tensors, tmp_path: Path) -> Path:
    """Write an adapter for q_proj and v_proj."""
    return write_adapter(tmp_path / "adapter", tensors)


def build(small: SimpleNamespace, adapter: Any, **options: Any) -> Llama:
    return Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", adapter=adapter, **options)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"peft_type": "IA3"}, ("peft_type is 'IA3'", "only 'LORA'")),
        ({"peft_type": None}, ("peft_type is None",)),
        ({"peft_type": ["LORA"]}, ("peft_type is ['LORA']",)),
        ({"use_dora": True}, ("use_dora is True", "DoRA")),
        ({"bias": "all"}, ("bias is 'all'", "biases")),
        ({"lora_bias": True}, ("lora_bias is True", "biases")),
        ({"use_dora": 1}, ("use_dora is 1", "DoRA")),
        ({"fan_in_fan_out": True}, ("fan_in_fan_out is True", "transposed")),
        ({"fan_in_fan_out": 1}, ("fan_in_fan_out is 1", "transposed")),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights is 'pissa'", "changed weights of the base")),
        ({"layer_replication": [[0, 2], [1, 2]]}, ("layer_replication", "used several times")),
        ({"alora_invocation_tokens": [5]}, ("alora_invocation_tokens",)),
        ({"trainable_token_indices": [5]}, ("trainable_token_indices", "single rows")),
        ({"target_parameters": ["experts.w"]}, ("target_parameters",)),
        ({"use_new_thing": True}, ("use_new_thing is True", "not known here")),
        ({"some_new_scale": 3.5}, ("some_new_scale is 3.5", "not known here")),
        ({"some_new_scale": 0}, ("some_new_scale is 0", "not known here")),
        ({"r": 0}, ("r is 0", "a whole number from 1")),
        ({"r": True}, ("r is True",)),
        ({"r": 8}, ("are (4, 64) and (64, 4)", "(8, 64) and (64, 8)")),
        ({"lora_alpha": "16"}, ("lora_alpha is '16'", "a number")),
        ({"lora_alpha": 1e31}, ("lora_alpha is 1e+31",)),
        ({"use_rslora": 1}, ("use_rslora is 1",)),
        ({"target_modules": 5}, ("target_modules is 5",)),
        ({"target_modules": [5]}, ("target_modules is [5]",)),
        ({"target_modules": ["q_proj", "c_attn"]}, ("target_modules names 'c_attn', which the model lacks",)),
        ({"target_modules": ["q_proj", "layers.7.mlp.up_proj"]}, ("'layers.7.mlp.up_proj', which the model lacks",)),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ("lacks model.layers.0.self_attn.k_proj",)),
        ({"target_modules": ["q_proj"]}, ("contains model.layers.0.self_attn.v_proj", "does not name")),
        ({"target_modules": "all-linear"}, ("lacks model.layers.0.mlp.down_proj", "and 7 more")),
        ({"layers_to_transform": [1]}, ("contains model.layers.0.self_attn.q_proj",)),
        ({"layers_to_transform": [1, 9]}, ("layers_to_transform names 9", "has 2 layers")),
        ({"layers_to_transform": ["1"]}, ("layers_to_transform is ['1']",)),
        ({"layers_pattern": "blocks"}, ("layers_pattern is 'blocks'",)),
        ({"exclude_modules": {}}, ("exclude_modules is {}",)),
        ({"modules_to_save": "lm_head"}, ("modules_to_save is 'lm_head'",)),
        ({"modules_to_save": ["score"]}, ("lacks 'score', which modules_to_save names",)),
        ({"rank_pattern": [1]}, ("rank_pattern is [1]",)),
        ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern is {'q_proj': 0}",)),
        ({"rank_pattern": {"q_proj": 2}}, ("are (4, 64) and (64, 4)", "(2, 64) and (64, 2)")),
        ({"alpha_pattern": {"(q+)+_proj": 2}}, ("alpha_pattern is {'(q+)+_proj': 2}",)),
        ({"alpha_pattern": {"q_proj": 3, "c_attn": 2}}, ("alpha_pattern names 'c_attn', which the model lacks",)),
        ({"rank_pattern": {"^layers.0.self_attn.q_proj": 4}}, ("rank_pattern names '^layers.0.self_attn.q_proj', which",)),
    ],
)  # fmt: skip
def test_adapters_of_other_kinds_and_wrong_settings_are_refused(
    small: SimpleNamespace, adapter: Path, monkeypatch: pytest.MonkeyPatch, config: dict, parts: tuple[str, ...]
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    monkeypatch.setattr(loading, "load_weights", lambda *_: pytest.fail("weights were read"))
    assert_raises(lambda: build(small, adapter), CheckpointError, str(adapter), *parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), ("q_proj has no lora_A",)),
        (lambda t: t.pop(f"{V}.lora_B.weight"), ("v_proj has no lora_B",)),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), ("q_proj has no lora_B",)),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(60, 4)}), ("are (4, 64) and (60, 4)", "(64, 4)")),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.tensor(1.0)}), ("are (4, 64) and ()", "(64, 4)")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 65)}), ("are (4, 65) and (64, 4)", "(4, 64)")),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(256)}), ("are (256,) and",)),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64).double()}), ("is torch.float64",)),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 64), float("nan"))}), ("the part for", "wq.weight", "NaN")),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}), ("lora_magnitude_vector", "no part of a LoRA")),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(64)}), ("lora_B.bias'", "no part of a LoRA")),
        (lambda t: t.update({"x": torch.ones(64)}), ("contains 'x'", "no part of a LoRA")),
        (lambda t: t.update({Q.replace(".0.", ".2.") + ".lora_A.weight": torch.ones(4, 64)}), ("the model lacks",)),
        (lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(4, 64)}), ("lora_embedding_A",)),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 64)}), ("the model lacks 'score'",)),
        (lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(64, 64)}), ("q_proj, which modules_to_save",)),
        (lambda t: t.update({NORM: torch.ones(64)}), ("whole weights of model.norm, which modules_to_save",)),
        (
            lambda t: t.update({f"{Q}.{end}": torch.ones(64, 64) for end in ("weight", "base_layer.weight")}),
            ("q_proj.base_layer.weight' and the same under another name",),
        ),
        (
            lambda t: t.update({f"{EMBEDDING}.{end}": torch.ones(4, 384) for end in ("lora_A.weight", "lora_embedding_A")}),
            ("embed_tokens.lora_embedding_A' and the same under another name",),
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(400, 64)}),
            ("lm_head.weight' is (400, 64), where the model has (384, 64)", "vocabulary was resized"),
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    small: SimpleNamespace, adapter: Path, tensors: Tensors, change: Callable[[Tensors], Any], parts: tuple[str, ...]
) -> None:
    change(tensors)
    write_safetensors(adapter / FILE, tensors)
    assert_raises(lambda: build(small, adapter), CheckpointError, str(adapter / FILE), *parts)


def test_an_adapter_without_tensors_is_refused(small: SimpleNamespace, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", {}, target_modules=".*q_proj")
    assert_raises(lambda: build(small, adapter), CheckpointError, str(adapter / FILE), "contains no tensors")


def test_settings_that_change_nothing_are_taken(small: SimpleNamespace, tensors: Tensors, tmp_path: Path) -> None:
    unset = {"use_dora": 0, "some_new_scale": None, "some_new_switch": False, "some_new_list": [], "some_new_config": {}}
    build(small, write_adapter(tmp_path / "a", tensors, **unset))


def test_values_too_large_for_the_dtype_are_refused(small: SimpleNamespace, adapter: Path, tensors: Tensors) -> None:
    write_safetensors(adapter / FILE, tensors | {f"{Q}.lora_B.weight": tensors[f"{Q}.lora_B.weight"] * 1e7})
    build(small, adapter)
    parts = "layers.0.attention.wq.weight with the adapter", "too large for torch.float16"
    assert_raises(lambda: build(small, adapter, dtype="float16"), CheckpointError, *parts)


def test_a_damaged_base_is_not_blamed_on_the_adapter(small: SimpleNamespace, adapter: Path, tmp_path: Path) -> None:
    weights = {name: weight.clone() for name, weight in small.weights.items()}
    weights["layers.0.attention.wq.weight"][3, 3] = float("nan")
    folder = write_shards(tmp_path / "model", small.params, weights)
    damaged = SimpleNamespace(folder=folder, tokenizer_path=small.tokenizer_path)
    assert_raises(
        lambda: build(damaged, adapter), CheckpointError, "wq.weight contains NaN or infinity: the shards are damaged"
    )


def test_a_tied_output_layer_is_not_adapted(small: SimpleNamespace, tmp_path: Path) -> None:
    weights = small.weights | {"output.weight": small.weights["tok_embeddings.weight"]}
    folder = write_hugging_face(tmp_path / "hf", SMALL, weights, tie_word_embeddings=True)
    tied = SimpleNamespace(folder=folder, tokenizer_path=small.tokenizer_path)
    adapter = write_adapter(tmp_path / "a", random_pairs(["lm_head"], hugging_face_weights(weights, HEAD_DIM)))
    assert_raises(lambda: build(tied, adapter), CheckpointError, "changes lm_head", "tie_word_embeddings")


def test_wrong_folders_are_explained(small: SimpleNamespace, adapter: Path, tmp_path: Path) -> None:
    for given, *parts in (
        (tmp_path / "nothing", "adapter is", "No such file"),
        (5, "adapter is 5 (int)"),
        ("", "an empty path"),
        (adapter / FILE, "a file, not a folder"),
        (tmp_path, "no adapter_config.json", "give one of the folders in it: adapter"),
        (small.folder, "no adapter_config.json"),
    ):
        assert_raises(lambda: build(small, given), CheckpointError, *parts)  # noqa: B023
    for ckpt_dir in (adapter, str(adapter)):
        build_it = lambda: Llama.build(ckpt_dir, small.tokenizer_path, device="cpu")  # noqa: B023, E731
        assert_raises(build_it, CheckpointError, "it contains an adapter", "as ckpt_dir, and this folder as adapter")
    (adapter / FILE).rename(tmp_path / FILE)
    assert_raises(lambda: build(small, adapter), CheckpointError, "neither adapter_model.safetensors nor adapter_model.bin")
    (adapter / FILE).symlink_to(tmp_path / FILE)
    assert_raises(lambda: build(small, adapter), CheckpointError, "a link to", "outside of the folder")


class RunsCode:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


def test_damaged_and_hostile_files_are_refused(
    small: SimpleNamespace, adapter: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    for contents, part in (
        ((adapter / FILE).read_bytes()[:-1], "its tensors have"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        ((100 << 20).to_bytes(8, "little") + b"[" * (100 << 20), "its header has 104,857,600 bytes"),
    ):
        (adapter / FILE).write_bytes(contents)
        assert_raises(lambda: build(small, adapter), CheckpointError, str(adapter / FILE), part)
    (adapter / FILE).unlink()
    torch.save(tensors | {"x": RunsCode()}, adapter / "adapter_model.bin")
    assert_raises(lambda: build(small, adapter), CheckpointError, "adapter_model.bin", "it could run code")
    assert "code was run" not in capsys.readouterr().out
    for text, part in (("{", "not JSON"), ("[]", "not an object"), ("[" * 100_000, "not JSON"), ("{}", "peft_type is None")):
        (adapter / "adapter_config.json").write_text(text)
        assert_raises(lambda: build(small, adapter), CheckpointError, "adapter_config.json", part)


def test_an_adapter_that_changes_while_it_is_read_is_refused(
    small: SimpleNamespace, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_weights

    def touch_and_load(*args: Any) -> None:
        os.utime(adapter / FILE, ns=(0, 5))
        load(*args)

    monkeypatch.setattr(loading, "load_weights", touch_and_load)
    assert_raises(lambda: build(small, adapter), CheckpointError, str(adapter / FILE), "was changed or replaced")
