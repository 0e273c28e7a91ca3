"""Test against transformers and PEFT, where they are installed: models and adapters that they have written themselves."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import convert_checkpoint

from .conftest import VOCAB
from .greedy_worker import NEW_TOKENS, PROMPTS
from .support import run, torchrun

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORKER = Path(__file__).with_name("greedy_worker.py")
# Six models: the settings in which each differs from the others, its dtype, and the size of its vocabulary.
MODELS: dict[str, tuple[dict[str, Any], torch.dtype, int]] = {
    "grouped heads": ({"num_key_value_heads": 4}, torch.float32, VOCAB),
    "one key/value head": ({"num_key_value_heads": 1}, torch.bfloat16, VOCAB),
    "resized vocabulary": ({"num_key_value_heads": 2}, torch.float32, VOCAB + 6),
    "linear scaling": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, torch.float32, VOCAB),
    "dynamic scaling": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, torch.bfloat16, VOCAB),
    "tied embeddings": ({"tie_word_embeddings": True, "head_dim": 16}, torch.float16, VOCAB),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "some modules": {"target_modules": ["q_proj", "v_proj"]},
    "all modules": {"target_modules": "all-linear", "use_rslora": True, "r": 12, "lora_alpha": 7},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"q_proj": 4, "model.layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 3, "down_proj": 32},
    },
    "a regular expression": {"target_modules": r".*\.mlp\.(up|down)_proj"},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["k_proj", "embed_tokens", "lm_head"]},
}


def write_model(folder: Path, name: str) -> Path:
    """Write one of MODELS with random weights, in several files."""
    settings, dtype, vocabulary = MODELS[name]
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=8, intermediate_size=192, vocab_size=VOCAB)
    torch.manual_seed(len(name))
    config = transformers.LlamaConfig(**{**sizes, "max_position_embeddings": 160, "initializer_range": 0.2, **settings})
    model = transformers.LlamaForCausalLM(config)
    if vocabulary != VOCAB:
        model.resize_token_embeddings(vocabulary)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    return folder


def load(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def results(ranks: int, out: Path, tokenizer_path: Path, folders: list[str]) -> dict[str, tuple[torch.Tensor, list]]:
    arguments = WORKER, out, tokenizer_path, *folders
    done = run(*arguments) if ranks == 1 else torchrun(ranks, *arguments)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def assert_same(model: Any, found: tuple[torch.Tensor, list], n_tokens: int = NEW_TOKENS) -> None:
    """Check the logits of PROMPTS and the greedy answers to them. Tokens that the tokenizer lacks are not generated."""
    tokens = torch.tensor(PROMPTS)
    with torch.no_grad():
        logits = model(tokens).logits
        spare = [*range(VOCAB, logits.shape[-1])] or None
        options = dict(max_new_tokens=n_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, suppress_tokens=spare)
        answers = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, tokens.shape[1] :]
    assert (logits - found[0]).abs().max() < 1e-4 and logits.std() > 0.05
    assert answers.tolist() == [answer[:n_tokens] for answer in found[1]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_models_that_transformers_has_written(tmp_path: Path, tokenizer_path: Path, ranks: int) -> None:
    # One key/value head cannot be divided among two ranks.
    names = [name for name, (settings, _, _) in MODELS.items() if ranks == 1 or settings.get("num_key_value_heads") != 1]
    folders = {name: write_model(tmp_path / name, name) for name in names}
    found = results(ranks, tmp_path / "out.pt", tokenizer_path, [str(folder) for folder in folders.values()])
    for folder in folders.values():
        assert_same(load(folder), found[str(folder)])


@pytest.mark.parametrize("name", ["grouped heads", "one key/value head", "resized vocabulary"])
def test_transformers_loads_what_convert_writes(tmp_path: Path, name: str) -> None:
    theirs = write_model(tmp_path / "theirs", name)
    metas = convert_checkpoint(theirs, tmp_path / "meta", "meta")
    ours = convert_checkpoint(metas, tmp_path / "ours", "hf", 2)
    weights, expected = load(ours).state_dict(), load(theirs).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in weights.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_that_peft_has_written(tmp_path: Path, tokenizer_path: Path, ranks: int) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs = write_model(tmp_path / "base", "grouped heads")
    metas = convert_checkpoint(theirs, tmp_path / "meta", "meta", 2)
    names = [*ADAPTERS] if ranks == 1 else ["all modules", "embeddings"]
    for name in names:
        settings = ADAPTERS[name]
        config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16} | settings)
        model = peft.get_peft_model(load(theirs), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
        model.save_pretrained(tmp_path / name)
    folders = {f"{base}::{tmp_path / name}": name for name in names for base in (theirs, metas)}
    found = results(ranks, tmp_path / "out.pt", tokenizer_path, [*folders])
    for folder, name in folders.items():
        assert_same(peft.PeftModel.from_pretrained(load(theirs), tmp_path / name).merge_and_unload(), found[folder], 10)
