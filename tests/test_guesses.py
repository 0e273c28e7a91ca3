"""Guesses: what prompt lookup finds and learns, how many guesses are chosen, and what steps are taken to cost."""

from llama.engine.prompt_lookup import PromptLookup
from llama.engine.speculation import choose_counts
from llama.engine.step_costs import LossLimit, StepCosts


def test_prompt_lookup_takes_the_longest_and_latest_match() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 3, 4, 5, 2, 3, 4])
    assert lookup.guess(3) == [9, 3, 4]  # after 2 3 4, not after the later 3 4
    lookup.append(9)
    assert lookup.guess(2) == [3, 4]
    assert PromptLookup([1, 2, 3]).guess(4) == []
    assert PromptLookup([1, 7, 8, 7, 8]).guess(5) == [7, 8, 7, 8, 7]  # what followed is taken to repeat


def test_prompt_lookup_learns_how_often_it_is_right() -> None:
    right, wrong = PromptLookup([5, 6] * 10), PromptLookup([5, 6] * 10)
    before = right.expected(3)
    assert before == sorted(before, reverse=True)
    for i in range(41):
        right.append((5, 6)[i % 2])
        wrong.append((5, 6, 7 + i)[i % 3])
    assert right.expected(3)[2] > 0.8
    assert wrong.expected(3)[0] < 0.5 < before[0]


def test_as_many_guesses_are_chosen_as_pay() -> None:
    def seconds(n_guesses: int, longest: int) -> float:
        return 1 + 0.1 * n_guesses

    assert choose_counts({0: [0.9, 0.8, 0.05]}, 1, seconds) == {0: 2}
    assert choose_counts({0: [0.01]}, 1, seconds) == {}
    assert choose_counts({0: [0.9, 0.8], 3: [0.05], 5: [0.7]}, 4, seconds) == {0: 2, 5: 1}
    assert choose_counts({0: [0.9, 0.8]}, 1, seconds, lambda row, n: 1.0) == {}  # guessing takes too long


def test_the_time_of_a_step_is_learned_and_estimated() -> None:
    costs = StepCosts()
    assert not costs.known(1) and costs.seconds(3) > costs.seconds(1) == 1
    for seconds in (9.0, 2.0, 2.0):  # the first one allocates memory
        costs.record(1, seconds)
    assert costs.known(1) and costs.seconds(1) == 2
    assert 2 < costs.seconds(4) < 3
    for _ in range(6):
        costs.record(5, 6.0)
    assert costs.seconds(3) == 4
    for _ in range(4):
        costs.record(5, 500.0)  # something has held these steps up
    assert costs.seconds(5) < 50
    for _ in range(300):
        costs.record(1, 2.0)
    assert costs.seconds(5) < 4  # forgotten, so that it is tried again


def slowdown(gain: float, n: int, cost: float = 1.4) -> float:
    """Return the time of n steps with guesses whenever the limit allows them, relative to steps without guesses.

    Each step takes `cost` and yields 1 + gain tokens.
    """
    limit, seconds, tokens = LossLimit(), 0.0, 0.0
    for _ in range(n):
        guesses = limit.allows_guesses(1.0)
        step, without = (cost, 1 + gain) if guesses else (1.0, 1.0)
        limit.record(step, without)
        seconds, tokens = seconds + step, tokens + without
    return seconds / tokens


def test_wrong_guesses_cost_at_most_three_percent_whatever_was_expected_of_them() -> None:
    """Guesses that double the time of a step are tried less often, so the limit holds for them, too. Right guesses go on."""
    for n in (150, 1000, 10000):
        assert slowdown(0.0, n) < 1.03 and slowdown(0.0, n, cost=2.0) < 1.03 and slowdown(0.3, n) < 1.03
        assert slowdown(1.0, n) < 0.75


def test_a_series_of_right_guesses_outweighs_a_few_wrong_ones() -> None:
    limit = LossLimit()
    for _ in range(3):
        limit.record(1.0, 1.0)
    limit.record(1.3, 1.0)
    assert limit.allows_guesses(1.0)
    for _ in range(10):
        limit.record(1.3, 3.0)
    for _ in range(3):
        limit.record(1.3, 1.0)
        assert limit.allows_guesses(1.0)


def test_after_long_gains_losses_are_still_short() -> None:
    limit = LossLimit()
    for _ in range(10000):
        limit.record(1.0, 3.0)
    n = 0
    while limit.allows_guesses(1.0):
        limit.record(1.5, 1.0)
        n += 1
    assert 2 <= n < 30
