"""Test against transformers and PEFT, where they are installed: models and adapters that they have written themselves."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, convert_checkpoint
from llama.hugging_face.load import load_tokenizer_and_chat_format

from .conftest import VOCAB
from .greedy_worker import NEW_TOKENS, PROMPTS
from .hf_text import LLAMA_2_TEMPLATE, SPACE, odd_strings
from .support import run, torchrun

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DEMO = Path(__file__).parents[1] / "demo"
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


def test_transformers_encodes_as_we_do_with_what_convert_writes(tmp_path: Path) -> None:
    """All texts have SentencePiece's tokens but those that begin with a blank, which transformers drops."""
    pytest.importorskip("google.protobuf", reason="protobuf is not installed, with which transformers reads tokenizer.model")
    llama = Llama.build(DEMO / "model", max_seq_len=64, max_batch_size=1, device="cpu")
    folder = convert_checkpoint(DEMO / "model", tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    dialog: Any = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    for messages in ([dialog[0]], [*dialog, dialog[0]], [{"role": "system", "content": "be brief"}, dialog[0]]):
        tokens = theirs.apply_chat_template(messages, chat_template=LLAMA_2_TEMPLATE, return_dict=False)
        assert tokens == llama.encode_dialog(messages)
    # The same vocabulary, read by us from the tokenizer.json that transformers makes of it.
    json_folder = tmp_path / "json"
    json_folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(folder / name, json_folder)
    (json_folder / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str())
    ours = load_tokenizer_and_chat_format(json_folder, None, llama.tokenizer.n_words).tokenizer
    for text in odd_strings(1000):
        tokens = llama.tokenizer.encode(text, bos=True, eos=False)
        assert ours.encode(text, bos=True, eos=False) == tokens, text
        if not text.startswith((" ", SPACE)):
            assert theirs.encode(text, split_special_tokens=True) == tokens, text


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
