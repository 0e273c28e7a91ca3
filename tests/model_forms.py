"""Fixtures and helpers for the tests of models with plain, packed and int8 weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llama import Llama, tuning

PROMPTS = [[1, 5, 9, 30, 8], [1, 7]]
FORMS = ["plain", "packed", "int8"]


def build(small: SimpleNamespace, form: str = "plain", **options: Any) -> Llama:
    form_options = {"plain": {}, "packed": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}}[form]
    return Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", **form_options, **options)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)  # pack even the small weights of the test model
    return request.param


@pytest.fixture
def built(small: SimpleNamespace, form: str) -> Llama:
    return build(small, form)


def greedy(llama: Llama) -> list[list[int]]:
    return llama.generate(PROMPTS, 8, temperature=0)[0]


def agrees_with_forward(llama: Llama, answers: list[list[int]]) -> bool:
    """Return True if all answers are greedy. Call `model.forward` as Meta's generation loop does, and compare the logit of each
    token with the largest logit."""
    tolerance = 0.05 if next(llama.model.parameters()).dtype == torch.float32 else 0.15
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    before = 0
    for position in range(min(map(len, PROMPTS)), tokens.shape[1]):
        logits = llama.model.forward(tokens[:, before:position], before)[:, -1]
        for row, prompt, row_logits in zip(rows, PROMPTS, logits, strict=True):
            if len(prompt) <= position < len(row) and row_logits.max() - row_logits[row[position]] > tolerance:
                return False
        before = position
    return True
