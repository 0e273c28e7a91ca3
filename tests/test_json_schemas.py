"""JSON by a schema from the demo model, with libraries for constrained decoding where they are installed.

The processors are those of docs/api.md and docs/integrations.md.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama

DEMO = Path(__file__).parents[1] / "demo"
PROMPTS = ["A bear:", "", "The capital of Italy is", "What is 2 + 3?"]


def is_object(value: Any, **members: Callable[[Any], bool]) -> bool:
    """Return True for an object that has exactly these members, each with a value that its function accepts."""
    return isinstance(value, dict) and value.keys() == members.keys() and all(f(value[k]) for k, f in members.items())


def described(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


# name: a schema, and a function that accepts its values only
SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "enum": ({"enum": ["red", "green", "dark blue"]}, lambda v: v in ("red", "green", "dark blue")),
    "nested": (
        described(a=described(b={"type": "boolean"}, c={"enum": ["x", "y z"]})),
        lambda v: is_object(v, a=lambda a: is_object(a, b=lambda b: isinstance(b, bool), c=lambda c: c in ("x", "y z"))),
    ),
    "array": (
        {"type": "array", "items": {"enum": ["a", "b", "c d"]}, "minItems": 1, "maxItems": 4},
        lambda v: isinstance(v, list) and 1 <= len(v) <= 4 and all(each in ("a", "b", "c d") for each in v),
    ),
    "characters of several bytes": (
        described(city={"enum": ["Z\u00fcrich", "\u65e5\u672c"]}, old={"type": "boolean"}),
        lambda v: is_object(v, city=lambda c: c in ("Z\u00fcrich", "\u65e5\u672c"), old=lambda o: isinstance(o, bool)),
    ),
}


def with_xgrammar(llama: Llama, schema: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that makes a logits processor for one answer."""
    xgrammar = pytest.importorskip("xgrammar")
    pieces = [llama.tokenizer.sp_model.id_to_piece(i) for i in range(llama.tokenizer.n_words)]
    info = xgrammar.TokenizerInfo(pieces, xgrammar.VocabType.BYTE_FALLBACK, stop_token_ids=[llama.tokenizer.eos_id])
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)

    def by_schema() -> Any:
        matcher, mask, seen = xgrammar.GrammarMatcher(grammar), xgrammar.allocate_token_bitmask(1, len(pieces)), None

        def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            for token in tokens[len(tokens) if seen is None else seen :]:
                assert matcher.accept_token(token)
            seen = len(tokens)
            matcher.fill_next_token_bitmask(mask)
            xgrammar.apply_token_bitmask_inplace(logits[None], mask)
            return logits

        return process

    return by_schema


def with_lm_format_enforcer(llama: Llama, schema: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that makes a logits processor for one answer."""
    lmformatenforcer = pytest.importorskip("lmformatenforcer")
    from lmformatenforcer.tokenenforcer import TokenEnforcerTokenizerData

    tokenizer, words = llama.tokenizer, []
    zero = tokenizer.encode("0", bos=False, eos=False)[-1]
    for token in range(3, tokenizer.n_words):
        text = tokenizer.decode([zero, token])[1:]
        words.append((token, text, text != tokenizer.decode([token])))
    data = TokenEnforcerTokenizerData(
        words, lambda tokens: tokenizer.decode(tokens).rstrip("\ufffd"), tokenizer.eos_id, False, tokenizer.n_words
    )

    def by_schema() -> Any:
        enforcer = lmformatenforcer.TokenEnforcer(data, lmformatenforcer.JsonSchemaParser(schema))

        def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
            allowed = enforcer.get_allowed_tokens(tokens).allowed_tokens
            masked = torch.full_like(logits, -torch.inf)
            masked[allowed] = logits[allowed]
            return masked

        return process

    return by_schema


@pytest.fixture(scope="module")
def demo() -> Llama:
    return Llama.build(DEMO / "model", max_seq_len=256, max_batch_size=8, device="cpu")


@pytest.mark.parametrize("library", [with_xgrammar, with_lm_format_enforcer])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_json_of_its_schema(demo: Llama, library: Callable[..., Any], name: str) -> None:
    if name == "characters of several bytes" and library is with_lm_format_enforcer:
        pytest.skip("lm-format-enforcer cannot write characters that the tokenizer splits into bytes")
    schema, accepts = SCHEMAS[name]
    by_schema = library(demo, schema)
    for temperature, seed in ((0, None), (1.0, 1), (1.0, 2)):
        options: Any = dict(temperature=temperature, seed=seed, details=True)
        answers = demo.text_completion(PROMPTS, logits_processor=[by_schema() for _ in PROMPTS], **options)
        dialogs: Any = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        replies = demo.chat_completion(dialogs, logits_processor=[by_schema() for _ in PROMPTS], **options)
        texts = [each["generation"] for each in answers] + [each["generation"]["content"] for each in replies]
        assert [each["finish_reason"] for each in (*answers, *replies)] == ["stop"] * 8
        assert all(accepts(json.loads(text)) for text in texts), texts
