"""Test what the server counts and measures."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from llama import Llama
from llama.engine.async_calls import AsyncTokens
from llama.engine.requests import GeneratedToken
from llama.engine.step_costs import StepCosts

pytest.importorskip("uvicorn", reason="the server needs the extra serve")
pytest.importorskip("starlette", reason="the server needs the extra serve")

from llama.server.metrics import Histogram

from . import server_client
from .server_client import CHAT, COMPLETION, MESSAGES, Client, wait_until

start = server_client.start  # a fixture


def test_metrics_count_tokens_requests_and_seconds(start: Callable[..., Client]) -> None:
    client = start()
    _, answer = client.post(CHAT, messages=MESSAGES, max_tokens=5, seed=1)
    client.post(CHAT, messages=[])
    values = dict(line.rsplit(" ", 1) for line in client.get("/metrics")[1].splitlines() if not line.startswith("#"))
    assert values['llama_requests_total{path="/v1/chat/completions",status="200"}'] == "1"
    assert values['llama_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert int(values["llama_prompt_tokens_total"]) == answer["usage"]["prompt_tokens"]
    assert int(values["llama_completion_tokens_total"]) == answer["usage"]["completion_tokens"]
    assert values["llama_rows"] == "6" and values["llama_answers_running"] == values["llama_answers_waiting"] == "0"
    assert values['llama_seconds_to_first_token_bucket{le="+Inf"}'] == values["llama_seconds_to_first_token_count"] == "1"
    assert 0 < float(values["llama_seconds_to_first_token_sum"]) < 60


def test_a_prompt_is_counted_once_as_in_usage(start: Callable[..., Client]) -> None:
    """n answers share a prompt, and a request that only scores its prompt generates nothing."""
    client, total = start(), 0
    for fields in (
        {"n": 2},
        {"echo": True, "max_tokens": 0, "logprobs": 0},
        {"echo": True, "max_tokens": 2},
        {"max_tokens": 0},
    ):
        total += client.post(COMPLETION, prompt=["The quick", "Once"], **fields)[1]["usage"]["prompt_tokens"]
        assert client.app.metrics.prompt_tokens == total, fields


def test_metrics_count_guesses(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCosts, "known", lambda self, n: True)
    monkeypatch.setattr(StepCosts, "seconds", lambda self, n: 1.0)
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", speculate="prompt")
    options = {"temperature": 0, "repetition_penalty": 0.2, "ignore_eos": True}  # lets the answer repeat the prompt
    prompt = [1, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
    (want,) = llama.text_completion([prompt], details=True, max_gen_len=40, **options)  # type: ignore[arg-type]
    client = Client(llama)
    try:
        assert client.post(COMPLETION, prompt=prompt, max_tokens=40, **options)[0] == 200
        wait_until(lambda: client.app.metrics.in_flight == 0)
        lines = client.get("/metrics")[1].splitlines()
    finally:
        client.stop()
    assert 0 < want["accepted_tokens"] <= want["guessed_tokens"]
    assert f"llama_guessed_tokens_total {want['guessed_tokens']}" in lines
    assert f"llama_accepted_tokens_total {want['accepted_tokens']}" in lines


def test_seconds_are_measured_from_acceptance_and_between_tokens(start: Callable[..., Client]) -> None:
    """What follows the last token, such as freeing the row, is no time of a token."""
    client = start()

    class SlowModel:
        tokenizer, model = client.app.llama.tokenizer, client.app.llama.model

        def agenerate_stream(self, *_: Any, **__: Any) -> AsyncTokens:
            return AsyncTokens([], self.slow_tokens())

        async def slow_tokens(self) -> AsyncGenerator[GeneratedToken, None]:
            try:
                for seconds in (0.12, 0.06, 0.06):
                    await asyncio.sleep(seconds)
                    yield GeneratedToken(0, 50, None)
            finally:
                await asyncio.sleep(1)

    client.app.llama = SlowModel()
    assert client.post(COMPLETION, prompt="The", max_tokens=9)[0] == 200
    metrics = client.app.metrics
    assert sum(metrics.seconds_to_first_token.counts) == sum(metrics.seconds_per_token.counts) == 1
    assert 0.12 <= metrics.seconds_to_first_token.total < 0.6
    assert 0.06 <= metrics.seconds_per_token.total < 0.5
    histogram = Histogram((0.1, 1.0))
    for value in (0.1, 0.05, 0.2, 5.0):
        histogram.observe(value)
    assert histogram.lines("x")[:3] == ['x_bucket{le="0.1"} 2', 'x_bucket{le="1.0"} 3', 'x_bucket{le="+Inf"} 4']
