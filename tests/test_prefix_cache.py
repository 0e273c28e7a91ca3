"""The prefix cache: tokens that prompts share are computed once, and no answer depends on it."""

import random
import threading
from pathlib import Path

import pytest

from llama import Llama, tuning
from llama.engine import scoring
from llama.engine.scoring import shares_long_prefixes

from . import prefixes
from .counting import count_forward_tokens
from .prefixes import GREEDY, assert_close, prompt, without_cache
from .support import random_weights, write_shards
from .test_batches import exact

fine, own = prefixes.fine, prefixes.own  # fixtures


# --- what is computed -------------------------------------------------------------------------------------------------------


def test_a_growing_prompt_is_computed_from_where_it_has_grown(own: Llama) -> None:
    first, grown = prompt((1, 20)), prompt((1, 20), (2, 9))
    want = without_cache(own, [grown], 6, **GREEDY)
    own.engine.forward().cache.prefixes.clear()
    own.generate([first], 6, temperature=0)
    with count_forward_tokens() as counts:
        got = own.generate([grown], 6, **GREEDY)
    assert counts[0] == len(grown) - 20
    assert_close(got, want)


def test_tokens_of_answers_are_computed_again(own: Llama) -> None:
    """Decode steps round differently. What an answer was computed with must not show in a later call."""
    first = prompt((1, 20))
    answer = own.generate([first], 30, temperature=0)[0][0]
    with count_forward_tokens() as counts:
        own.generate([[*first, *answer]], 2, temperature=0)
    assert counts[0] == len(first) + len(answer) - 20


def test_dialogs_with_one_system_text_compute_it_once(own: Llama) -> None:
    """Run 14 prompts in 6 rows. Their common beginning is computed by the first, and copied by the others."""
    prompts = [prompt((1, 24), (10 + i, 5 + i % 3)) for i in range(14)]
    want = without_cache(own, prompts, 4, **GREEDY)
    own.engine.forward().cache.prefixes.clear()
    with count_forward_tokens() as counts:
        got = own.generate(prompts, 4, **GREEDY)
    assert_close(got, want)
    assert counts[:2] == [len(prompts[0]), sum(len(each) - 24 for each in prompts[1:6])]
    assert sum(counts) < 25 + 13 * (7 + 2) + 14 * 4


def test_prompts_that_share_in_turn_wait_for_each_other(own: Llama) -> None:
    """A prompt takes most from the second, which takes most from the first: three prefills."""
    prompts = [prompt((1, 40)), prompt((1, 24), (2, 20)), prompt((1, 24), (2, 12), (3, 8)), prompt((4, 7))]
    want = without_cache(own, prompts, 4, **GREEDY)
    own.engine.forward().cache.prefixes.clear()
    with count_forward_tokens() as counts:
        got = own.generate(prompts, 4, **GREEDY)
    assert_close(got, want)
    assert counts[:3] == [len(prompts[0]) + len(prompts[3]), len(prompts[1]) - 24, len(prompts[2]) - 36]


def test_dialogs_that_take_turns_keep_their_prefixes_in_free_rows(own: Llama) -> None:
    """Three dialogs alternate in calls of one prompt, all of which run in row 0."""
    dialogs = [prompt((seed, 16)) for seed in (1, 2, 3)]
    for turn in range(3):
        for i, dialog in enumerate(dialogs):
            with count_forward_tokens() as counts:
                own.generate([dialog], 3, temperature=0)
            assert counts[0] == (len(dialog) if turn == 0 else len(dialog) - 16 - 8 * (turn - 1))
            dialogs[i] = [*dialog, *prompt((10 * turn + i, 7))]


def test_the_prefix_that_was_not_used_for_the_longest_time_is_given_up(own: Llama) -> None:
    prompts = [prompt((seed, 16)) for seed in range(8)]
    for each in (*prompts[:6], prompts[0], prompts[6]):  # 6 rows: the seventh takes the row of the second, not the first
        own.generate([each], 2, temperature=0)
    for each, is_held in ((prompts[0], True), (prompts[1], False)):
        with count_forward_tokens() as counts:
            own.generate([each], 2, temperature=0)
        assert (counts[0] < 17) == is_held


def test_scores_of_many_choices_compute_head_and_questions_once(own: Llama) -> None:
    head, texts = "Once upon a time there was a bear, ", ["who was big", "that ate honey"]
    prompts = [head + text for text in texts for _ in range(4)]
    choices = [" and slept", " and ran", " or swam", " all day"] * 2
    with pytest.MonkeyPatch.context() as patch, count_forward_tokens() as counts:
        patch.setattr(scoring, "shares_long_prefixes", lambda *_: False)
        want = own.score(prompts, choices)
        assert len(counts) == 1
    with count_forward_tokens() as counts:
        got = own.score(prompts, choices)
    assert len(counts) > 1  # in rows of the cache
    assert [score.tokens for score in got] == [score.tokens for score in want]
    for score, expected in zip(got, want, strict=True):
        assert score.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    n_tokens = [len(own.tokenizer.encode(p + c, True, False)) for p, c in zip(prompts, choices, strict=True)]
    assert sum(counts) < sum(n_tokens) / 2
    assert own.score(prompts[:1], choices[:1])[0].logprobs == pytest.approx(want[0].logprobs, abs=1e-4)


def test_sequences_without_a_long_common_beginning_are_scored_without_the_cache() -> None:
    long = [prompt((1, 300), (2, 3)), prompt((1, 300), (3, 3))]
    assert shares_long_prefixes(long, 256, 1) and shares_long_prefixes(long, 256, 128)
    assert not shares_long_prefixes(long, 1024, 1) and not shares_long_prefixes(long, 256, 512)
    assert not shares_long_prefixes([prompt((1, 300)), prompt((2, 300)), prompt((3, 300))], 256, 1)


def test_scored_prompts_take_only_tokens_that_are_not_scored(own: Llama) -> None:
    """With `echo` and `logprobs` all tokens of a prompt are scored, so that none is taken from the cache."""
    prompts = [prompt((1, 20)), prompt((1, 20), (2, 5))]
    want = without_cache(own, prompts, 4, echo=True, **GREEDY)
    for _ in range(2):
        assert_close(own.generate(prompts, 4, echo=True, **GREEDY), want)


def test_streams_tell_how_many_tokens_came_from_the_cache(own: Llama) -> None:
    text = "Once upon a time there was a bear that ate"
    first, second = (own.text_completion_stream(text, 0, max_gen_len=3) for _ in range(2))
    assert "".join(first) == "".join(second)
    assert (first.cached_tokens, second.cached_tokens > 0) == (0, True)


# --- exactness --------------------------------------------------------------------------------------------------------------


@exact
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("head_dim", [64, 32])
def test_answers_are_bitwise_the_same_with_and_without_shared_prefixes(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, format: str | None, head_dim: int
) -> None:
    """Compare prompts that share 1 to 300 tokens, in one call and in calls one after another."""
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 512)
    params = dict(
        dim=256, n_layers=2, n_heads=256 // head_dim, n_kv_heads=2, multiple_of=32, norm_eps=1e-5, vocab_size=-1
    )  # fmt: skip
    folder = write_shards(tmp_path, params, random_weights(params, 384, 704))
    llama = Llama.build(folder, tokenizer_path, 512, 4, device="cpu", dtype="bfloat16", quantize=format)
    prompts = [prompt((1, n), (n, m)) for n, m in ((300, 3), (300, 40), (299, 1), (257, 1), (130, 170), (127, 2), (40, 1))]
    want = [without_cache(llama, [each], 6, **GREEDY) for each in prompts]
    llama.engine.forward().cache.prefixes.clear()
    with count_forward_tokens() as counts:
        got = [llama.generate([each], 6, **GREEDY) for each in (*prompts, *prompts)]
    assert got == [*want, *want]
    assert sum(counts) < sum(map(len, prompts))
    llama.engine.forward().cache.prefixes.clear()
    together = llama.generate(prompts, 6, **GREEDY)
    assert together == ([tokens[0] for tokens, _ in want], [values[0] for _, values in want])


@pytest.mark.usefixtures("fine", "either_backend")
def test_threads_that_leave_and_come_back_get_the_answers_of_each_prompt_alone(llama: Llama) -> None:
    prompts = [prompt((i % 3, 12), (i % 7, 8), (i, 3 + i % 5)) for i in range(30)]
    want = [without_cache(llama, [each], 6, **GREEDY) for each in prompts]
    wrong: list[int] = []

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(8):
            i = rng.randrange(30)
            if rng.random() < 0.3:  # leave in the middle
                stream = llama.generate_stream([prompts[i]], 6, temperature=0)
                next(stream)
                stream.close()
            elif llama.generate([prompts[i]], 6, temperature=0)[0] != want[i][0]:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
