"""Run a fixed, small number of the cases that tests/fuzz.py generates. `make fuzz` runs new random cases for half an hour."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from .fuzz import CASES, play
from .hostile_zips import FRAGMENTS

N_CASES = {
    "bytes": 200,
    "tokenizer": 100,
    "contents": 80,
    "pickle": 80,
    "zip": 40,
    "header": 100,
    "params": 150,
    "call": 150,
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns about deprecated types in the hostile files


@pytest.mark.parametrize("target", CASES)
def test_hostile_input_ends_in_a_llama_error_or_a_correct_answer(target: str) -> None:
    @settings(
        max_examples=N_CASES[target], derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(CASES[target])
    def play_case(case: Any) -> None:
        play(target, *case)

    play_case()


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_each_hostile_pickle_by_itself_raises_checkpoint_error(fragment: str) -> None:
    assert play("pickle", [fragment], [], False) == "CheckpointError"
