"""Test `python -m llama info DIR`: it tells what a folder contains, without reading weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama import CheckpointError, save_packed_file
from llama.cli.main import main
from llama.hugging_face.load import describe_template
from llama.planning import describe_folder

from .hf_text import LLAMA_2_TEMPLATE
from .hugging_face import (
    HEAD_DIM,
    MODEL,
    edit_config,
    hugging_face_weights,
    random_pairs,
    write_adapter,
    write_hugging_face,
    write_with_tokenizer,
)
from .support import assert_raises, random_weights, write_shards


def lines_of(folder: Path) -> dict[str, str]:
    return {line[:24].rstrip(): line[24:] for line in describe_folder(folder, describe_template).splitlines()}


def test_a_model_in_metas_layout(small: SimpleNamespace, tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in small.weights.items()}
    folder = write_shards(tmp_path, small.params, weights, 2)
    lines = lines_of(folder)
    assert lines["layout"] == "Meta's" and lines["weights"].startswith("2 files, 0.3")
    assert lines["weights"].endswith("bfloat16 and float32")  # rope.freqs is float32
    assert lines["parameters"] == f"{sum(weight.numel() for weight in weights.values()):,}"
    assert lines["vocabulary"] == "384 tokens" and lines["rotary embedding"] == "theta 10000"
    assert lines["tokenizer"] == "none: give tokenizer_path" and lines["saved packed weights"] == "none"
    assert "int8 " in lines["memory, one rank"] and "1 x 4,096 tokens" in lines["memory, one rank"]
    save_packed_file(folder, "int8")
    assert lines_of(folder)["saved packed weights"] == "int8.safetensors"
    for path in folder.glob("*.pth"):
        path.unlink()
    lines = lines_of(folder)
    assert lines["weights"] == "none but the packed ones" and lines["vocabulary"] == "384 tokens"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "none stored"),
        (LLAMA_2_TEMPLATE, "Llama 2's"),
        ("{{ '[INST] <<SYS>>' }}", "another one"),
        ("{{ '<|im_start|>' }}", "ChatML"),
        ("{{ '<|user|>' }}", "Zephyr's"),
        ("{{ 'USER: ' }}", "Vicuna's"),
        ("{{ 'Q: ' }}", "another one"),
    ],
)
def test_a_model_in_hugging_faces_layout(small: SimpleNamespace, tmp_path: Path, template: str | None, name: str) -> None:
    folder = write_with_tokenizer(small, tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    edit_config(folder, rope_scaling={"type": "dynamic", "factor": 2.0})
    lines = lines_of(folder)
    assert lines["layout"] == "Hugging Face's" and lines["weights"].endswith("float32") and lines["chat template"] == name
    assert lines["context"] == "2,048 tokens" and "1 x 2,048 tokens" in lines["memory, one rank"]
    assert lines["rotary embedding"] == "theta 10000, dynamic scaling by 2.0"
    assert lines["tokenizer"] == "tokenizer.model (SentencePiece), in the parent folder"


def test_a_tied_output_layer_is_counted_once(small: SimpleNamespace, tmp_path: Path) -> None:
    weights = random_weights(small.params, 384, 192)
    folder = write_hugging_face(tmp_path, small.params, weights, tie_word_embeddings=True)
    count = sum(weight.numel() for weight in weights.values()) - weights["output.weight"].numel()
    assert lines_of(folder)["parameters"] == f"{count:,}; the output layer is the embedding"


def test_an_adapter(small: SimpleNamespace, tmp_path: Path) -> None:
    tensors = random_pairs(["model.layers.0.self_attn.q_proj"], hugging_face_weights(small.weights, HEAD_DIM))
    folder = write_adapter(tmp_path / "adapter", tensors, use_rslora=True)
    assert lines_of(folder) == {
        "adapter": "LoRA for 'someone/model': give this folder to build(adapter=), or to --adapter",
        "rank and alpha": "4, 6, rank-stabilised",
        "modules": "q_proj",
    }
    write_adapter(folder, tensors, use_dora=True)
    assert_raises(lambda: describe_folder(folder, describe_template), CheckpointError, "use_dora")


def test_the_command_and_what_it_refuses(small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_with_tokenizer(small, tmp_path)
    assert main(["info", str(folder)]) == 0
    assert capsys.readouterr().out == f"{describe_folder(folder, describe_template)}\n"
    assert main(["info", str(folder), "--device", "cpu"]) == 1
    assert "run info twice" in capsys.readouterr().err
    (folder / MODEL).write_bytes(b"")
    assert main(["info", str(folder)]) == 1
    assert "it is empty" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 1
    assert "no params.json" in capsys.readouterr().err


def test_errors_call_the_folder_dir(small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "ckpt_dir" / "model", small.params, small.weights)
    inner = tmp_path / "ckpt_dir" / "model"
    for given, error in (
        ("nope", "llama: DIR is 'nope': No such file or directory; it must be the path of a model's folder"),
        (inner.parent, f"llama: {inner.parent}: no params.json; it contains a model's folder; give {inner} as DIR\n"),
    ):
        assert main(["info", str(given)]) == 1
        assert capsys.readouterr().err.startswith(error)


def test_commands_tell_what_to_give_instead_of_an_adapter(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_adapter(tmp_path / "a", {}))
    model = "give the folder of the model that was adapted"
    merge = "merge it into its model with python -m llama convert --adapter, and give the result"
    for command, advice in (
        (["complete", "--ckpt_dir", folder, "hi"], f"{model} as --ckpt_dir, and this folder as --adapter"),
        (["convert", folder, str(tmp_path / "new"), "--to", "hf"], f"{model} as SRC, and this folder as --adapter"),
        (["plan", "--ckpt_dir", folder], f"{model}; merged, an adapter takes no further memory"),
        (["info", "--ckpt_dir", folder], f"{model}; python -m llama info, with the folder alone, describes it"),
        (["quantize", "--ckpt_dir", folder, "int8"], merge),
    ):
        assert main(command) == 1
        error = f"llama: {folder}: it contains an adapter (adapter_config.json), not a model: {advice}\n"
        assert capsys.readouterr().err == error
