"""What only a GPU can show: captured steps, compiled blocks, and the CPU's answers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama

from .support import write_shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, *range(20, 150)]]


def build(small: SimpleNamespace, folder: Path | None = None, **options: object) -> Llama:
    return Llama.build(folder or small.folder, small.tokenizer_path, 300, 4, **options)  # type: ignore[arg-type]


def test_float32_answers_are_the_cpus(small: SimpleNamespace) -> None:
    want, values = build(small, device="cpu").generate(PROMPTS, 40, temperature=0, logprobs=True)
    got, mine = build(small, device="cuda").generate(PROMPTS, 40, temperature=0, logprobs=True)
    assert got == want
    for row, expected in zip(mine or [], values or [], strict=True):
        assert row == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_and_uncaptured_greedy_ids_are_equal(small: SimpleNamespace, compile: bool, dtype: str) -> None:
    """Across buckets, rows and calls, and after a call of other rows in between."""
    llama = build(small, device="cuda", dtype=dtype, compile=compile)
    llama.engine.decoder.captures = False
    want = [llama.generate(prompts, 160, temperature=0)[0] for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    llama.engine.decoder.captures = True
    llama.engine.decoder.steps.clear()
    got = [llama.generate(prompts, 160, temperature=0)[0] for prompts in (PROMPTS, PROMPTS[:1], PROMPTS)]
    assert llama.engine.decoder.captures, "nothing was captured"
    assert got == want
    assert all(step.replay.__name__ == "replay" for step in llama.engine.decoder.steps.values())


def test_drawn_ids_do_not_depend_on_capture(small: SimpleNamespace) -> None:
    llama, answers = build(small, device="cuda"), []
    for static in (False, None):
        llama.engine.decoder.static = static
        torch.manual_seed(3)
        answers.append(llama.generate(PROMPTS, 60, temperature=0.7, top_p=0.9)[0])
    assert answers[0] == answers[1]


def test_more_prompts_than_rows_answer_as_on_the_cpu(small: SimpleNamespace) -> None:
    """Prompts take slots between captured steps, of which each is launched before the last one's ids are read."""
    prompts = [[1, *range(5 * i + 5, 5 * i + 6 + i % 7)] for i in range(15)]
    options: dict = dict(logprobs=True, temperature=1.0, seed=range(15), repetition_penalty=1.2, top_k=50)
    want, values = build(small, device="cpu").generate(prompts, 40, **options)
    got, mine = build(small, device="cuda").generate(prompts, 40, **options)
    assert got == want
    for row, expected in zip(mine or [], values or [], strict=True):
        assert row == pytest.approx(expected, abs=1e-3)


def test_a_turn_goes_on_where_the_last_one_ended(small: SimpleNamespace) -> None:
    llama = build(small, device="cuda")
    text = "Once upon a time"
    for _ in range(3):
        answer = "".join(llama.text_completion_stream(text, 0, max_gen_len=20, reuse=True))
        assert answer == llama.text_completion([text], 0, max_gen_len=20)[0]["generation"]
        list(llama.text_completion_stream(text, 0, max_gen_len=20, reuse=True))
        text += answer + " and"


def test_shards_load_onto_the_gpu(tmp_path: Path, small: SimpleNamespace) -> None:
    want = build(small, device="cpu").generate(PROMPTS, 20, temperature=0)[0]
    folder = write_shards(tmp_path, small.params, small.weights, 4)
    assert build(small, folder, device="cuda").generate(PROMPTS, 20, temperature=0)[0] == want
