"""The adapter for lm-evaluation-harness, where the harness is installed: requests as its tasks make them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama import InputError, Llama

from .conftest import VOCAB
from .hf_text import byte_level_json, write
from .hugging_face import write_hugging_face
from .support import random_weights

pytest.importorskip("lm_eval")

from llama.integrations.lm_eval import LlamaMeta

CHAT_ML = """\
{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture
def adapter(llama: Llama) -> LlamaMeta:
    return LlamaMeta(llama=llama)


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_log_likelihoods_are_scores(adapter: LlamaMeta, llama: Llama) -> None:
    pairs = [("Once upon", " a time"), ("The capital of France is", " Paris."), ("Once upon", " the sea"), ("", "sea shells")]
    results = adapter.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    scores = llama.score(*zip(*pairs, strict=True))
    assert [total for total, _ in results] == pytest.approx([score.total for score in scores], abs=1e-4)
    assert [greedy for _, greedy in results] == [score.is_greedy for score in scores]


def test_a_context_that_is_too_long_loses_its_beginning(adapter: LlamaMeta, llama: Llama) -> None:
    context, continuation = [1, *range(5, 100)], [7, 9, 11]
    ((total, _),) = adapter._loglikelihood_tokens([(None, context, continuation)])
    assert total == pytest.approx(llama.score([context[-62:]], [continuation])[0].total, abs=1e-4)
    with pytest.raises(InputError, match="request 0 scores 65 tokens, more than max_seq_len=64"):
        adapter._loglikelihood_tokens([(None, [1], [5] * 65)])


def test_rolling_log_likelihoods_score_each_token_once(adapter: LlamaMeta, llama: Llama) -> None:
    short, long = "She sells sea shells", "the sea shore and the river " * 20
    results = adapter.loglikelihood_rolling([request(short), request(long)], disable_tqdm=True)
    assert results[0] == pytest.approx(llama.score([""], [short])[0].total, abs=1e-3)
    tokens = llama.tokenizer.encode(long, False, False)
    windows = [(tokens[i - 1 : i] if i else [1], tokens[i : i + 64]) for i in range(0, len(tokens), 64)]
    last = len(windows[-1][1])
    windows[-1] = tokens[-65:-last], tokens[-last:]  # the last window has the whole context
    assert results[1] == pytest.approx(sum(s.total for s in llama.score(*zip(*windows, strict=True))), abs=1e-3)


def test_answers_end_before_the_first_stop_string_and_keep_their_order(adapter: LlamaMeta, llama: Llama) -> None:
    kwargs = {"until": ["e", ""], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    sampled = {"max_gen_toks": 6, "temperature": 0.8, "do_sample": True, "seed": 3}
    results = adapter.generate_until([request("a time", kwargs), request("sea", sampled), request("the fox", kwargs)])
    want = llama.text_completion(["a time", "the fox"], 0, 1.0, 12, stop="e")
    assert [results[0], results[2]] == [each["generation"] for each in want]
    assert results[1] == llama.text_completion(["sea"], 0.8, 1.0, 6, seed=3)[0]["generation"]
    with pytest.raises(InputError, match="generation_kwargs has num_beams, which llama-meta does not know"):
        adapter.generate_until([request("sea", {"num_beams": 4})])


def test_dialogs_are_encoded_as_for_chat_completion(adapter: LlamaMeta, llama: Llama) -> None:
    dialog = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "good morning"},
        {"role": "user", "content": "what?"},
    ]
    text = adapter.apply_chat_template(dialog)
    assert adapter.tok_encode(text) == llama.encode_dialog(dialog)
    context, continuation = adapter._encode_pair(text, " the sea")
    begun = [*dialog, {"role": "assistant", "content": "the sea"}]
    assert context + continuation == llama.encode_dialog(begun, continue_answer=True)


def test_white_space_at_the_end_of_a_template_is_scored_with_the_choice_as_by_hf(
    small: SimpleNamespace, tmp_path: Path
) -> None:
    transformers, models = pytest.importorskip("transformers"), pytest.importorskip("lm_eval.models.huggingface")
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<end>"}
    folder = write_hugging_face(tmp_path / "hf", small.params, random_weights(small.params, VOCAB, 64), eos_token_id=2)
    write(folder, tokenizer=byte_level_json(), tokenizer_config=tokens | {"chat_template": CHAT_ML})
    adapter = LlamaMeta(llama=Llama.build(folder, max_seq_len=64, max_batch_size=1, device="cpu"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens)
    tokenizer.chat_template, tokenizer.pad_token_id = CHAT_ML, 0
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hf = models.HFLM(model, tokenizer=tokenizer, device="cpu", max_length=64)
    dialog = [{"role": "user", "content": "What?"}]
    requests = [[request(each.apply_chat_template(dialog), "The sea")] for each in (hf, adapter)]
    (theirs,), (ours,) = hf.loglikelihood(requests[0], True), adapter.loglikelihood(requests[1], True)
    assert hf.tokenizer.decode(hf._encode_pair(*requests[0][0].args)[1]) == "\nThe sea"
    assert ours == pytest.approx(theirs, abs=1e-4)
