"""Code Llama's infilling, as its own example calls it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from llama import InputError, Llama, Tokenizer

from .support import random_weights, train_tokenizer, write_shards

PIECES = ["\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"]
PROMPTS = ["the quick <FILL> jumps over", "once <FILL>\n    upon a time"]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small model whose tokenizer has the four tokens."""
    folder = tmp_path_factory.mktemp("code")
    tokenizer = train_tokenizer(folder / "tokenizer.model", 384, pieces=PIECES)
    params = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
    write_shards(folder, params, random_weights(params, 384, 192))
    return SimpleNamespace(folder=folder, tokenizer=tokenizer)


def test_as_code_llamas_example_calls_it(code: SimpleNamespace) -> None:
    generator = Llama.build(ckpt_dir=str(code.folder), tokenizer_path=str(code.tokenizer), max_seq_len=192, max_batch_size=4)
    prefixes, suffixes = zip(*(prompt.split("<FILL>") for prompt in PROMPTS), strict=True)
    results = generator.text_infilling(prefixes=prefixes, suffixes=suffixes, max_gen_len=8, temperature=0.0, top_p=0.9)
    assert len(results) == len(PROMPTS)
    for prefix, suffix, result in zip(prefixes, suffixes, results, strict=True):
        assert result["full_text"] == prefix + result["generation"] + suffix and result["generation"]
    tokenizer = generator.tokenizer
    rest = [tokenizer.suffix_id, *tokenizer.encode_infilling(suffixes[0]), tokenizer.middle_id]
    known = tokenizer.encode(prefixes[0], bos=False, eos=False)
    first = [tokenizer.bos_id, tokenizer.prefix_id, *known, *rest]
    tokens, _ = generator.generate([first], 8, temperature=0, stop_token=tokenizer.eot_id)
    assert results[0]["generation"] == tokenizer.decode_infilling(tokens[0])
    other = [tokenizer.bos_id, tokenizer.prefix_id, *rest, *known]
    tokens, values = generator.generate([other], 8, temperature=0, stop_token=tokenizer.eot_id, logprobs=True)
    (result,) = generator.text_infilling(prefixes[:1], suffixes[:1], 0, max_gen_len=8, suffix_first=True, logprobs=True)
    assert result["generation"] == tokenizer.decode_infilling(tokens[0]) and result["logprobs"] == (values or [])[0]
    assert len(result["tokens"]) == len(tokens[0])


def test_it_ends_at_its_own_token(code: SimpleNamespace) -> None:
    generator = Llama.build(code.folder, code.tokenizer, 192, 4, device="cpu")
    tokenizer, prompt = generator.tokenizer, [1, 5, 9]
    whole = generator.generate([prompt], 8, temperature=0)[0][0]
    tokenizer.eot_id = whole[3]
    assert generator.generate([prompt], 8, temperature=0, stop_token=tokenizer.eot_id)[0][0] == whole[: whole.index(whole[3])]
    for bad in ("2", 1.5, True):
        with pytest.raises(InputError, match="stop_token is"):
            generator.generate([prompt], 8, stop_token=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["a b", " a", "  the", "\n", "", "é☺"])
def test_text_in_the_middle_keeps_its_spaces(code: SimpleNamespace, text: str) -> None:
    tokenizer = Tokenizer(code.tokenizer)
    assert tokenizer.decode_infilling(tokenizer.encode_infilling(text)) == text


def test_a_tokenizer_without_the_tokens_is_told(llama: Llama, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    assert [tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id] == [-1] * 4
    with pytest.raises(InputError, match=r"no tokens for infilling .*use Code Llama 7B or 13B"):
        llama.text_infilling(["a"], ["b"])
    with pytest.raises(InputError, match="2 prefixes, but 1 suffixes"):
        llama.text_infilling(["a", "b"], ["b"])
