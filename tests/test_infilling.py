"""Test infilling as in Code Llama: the calls of Code Llama's example, the end of an answer, and the tokenizer."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from llama import InputError, Llama, Tokenizer

from .support import random_weights, train_tokenizer, write_shards

PIECES = ["\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>", "\u2581<EOT>"]
PROMPTS = ["the quick <FILL> jumps over", "once <FILL>\n    upon a time"]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Write a small model whose tokenizer has the four infilling tokens."""
    folder = tmp_path_factory.mktemp("code")
    tokenizer = train_tokenizer(folder / "tokenizer.model", 384, pieces=PIECES)
    params = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
    write_shards(folder, params, random_weights(params, 384, 192))
    return SimpleNamespace(folder=folder, tokenizer=tokenizer)


def test_text_infilling_generates_from_code_llamas_prompt_format(code: SimpleNamespace) -> None:
    """Call `text_infilling` as Code Llama's example does, and compare with `generate` on prompts built by hand."""
    generator = Llama.build(ckpt_dir=str(code.folder), tokenizer_path=str(code.tokenizer), max_seq_len=192, max_batch_size=4)
    prefixes, suffixes = zip(*(prompt.split("<FILL>") for prompt in PROMPTS), strict=True)
    results = generator.text_infilling(prefixes=prefixes, suffixes=suffixes, max_gen_len=8, temperature=0.0, top_p=0.9)
    assert len(results) == len(PROMPTS)
    for prefix, suffix, result in zip(prefixes, suffixes, results, strict=True):
        assert result["full_text"] == prefix + result["generation"] + suffix and result["generation"]
    tokenizer = generator.tokenizer
    suffix_part = [tokenizer.suffix_id, *tokenizer.encode_infilling(suffixes[0]), tokenizer.middle_id]
    prefix_tokens = tokenizer.encode(prefixes[0], bos=False, eos=False)
    prefix_first = [tokenizer.bos_id, tokenizer.prefix_id, *prefix_tokens, *suffix_part]
    tokens, _ = generator.generate([prefix_first], 8, temperature=0, stop_token=tokenizer.eot_id)
    assert results[0]["generation"] == tokenizer.decode_infilling(tokens[0])
    suffix_first = [tokenizer.bos_id, tokenizer.prefix_id, *suffix_part, *prefix_tokens]
    tokens, logprobs = generator.generate([suffix_first], 8, temperature=0, stop_token=tokenizer.eot_id, logprobs=True)
    (result,) = generator.text_infilling(prefixes[:1], suffixes[:1], 0, max_gen_len=8, suffix_first=True, logprobs=True)
    assert result["generation"] == tokenizer.decode_infilling(tokens[0]) and result["logprobs"] == (logprobs or [])[0]
    assert len(result["tokens"]) == len(tokens[0])


def test_stop_token_ends_an_answer_in_place_of_eos(code: SimpleNamespace) -> None:
    generator = Llama.build(code.folder, code.tokenizer, 192, 4, device="cpu")
    tokenizer, prompt = generator.tokenizer, [1, 5, 9]
    answer = generator.generate([prompt], 8, temperature=0)[0][0]
    tokenizer.eot_id = answer[3]
    stopped = generator.generate([prompt], 8, temperature=0, stop_token=tokenizer.eot_id)[0][0]
    assert stopped == answer[: answer.index(answer[3])]
    for bad in ("2", 1.5, True):
        with pytest.raises(InputError, match="stop_token is"):
            generator.generate([prompt], 8, stop_token=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["a b", " a", "  the", "\n", "", "é☺"])
def test_infilled_text_keeps_its_spaces_when_encoded_and_decoded(code: SimpleNamespace, text: str) -> None:
    tokenizer = Tokenizer(code.tokenizer)
    assert tokenizer.decode_infilling(tokenizer.encode_infilling(text)) == text


def test_infilling_is_refused_for_a_tokenizer_without_the_tokens(llama: Llama, tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_path)
    assert [tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id] == [-1] * 4
    with pytest.raises(InputError, match=r"no tokens for infilling .*use Code Llama 7B or 13B"):
        llama.text_infilling(["a"], ["b"])
    with pytest.raises(InputError, match="2 prefixes, but 1 suffixes"):
        llama.text_infilling(["a", "b"], ["b"])
