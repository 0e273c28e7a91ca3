"""The strategies of tests/fuzz.py, the same few cases each time: for others, `make fuzz`."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from .fuzz import CASES, play
from .hostile_zips import FRAGMENTS

CASES_EACH = {
    "bytes": 200,
    "tokenizer": 100,
    "contents": 80,
    "pickle": 80,
    "zip": 40,
    "header": 100,
    "params": 150,
    "call": 150,
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, as it makes what it will not make for long


@pytest.mark.parametrize("target", CASES)
def test_hostile_input_ends_in_an_error_or_a_right_answer(target: str) -> None:
    @settings(
        max_examples=CASES_EACH[target], derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(CASES[target])
    def one(case: Any) -> None:
        play(target, *case)

    one()


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_each_hostile_pickle_alone(fragment: str) -> None:
    assert play("pickle", [fragment], [], False) == "CheckpointError"
