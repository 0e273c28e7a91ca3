"""What generation means: lengths, ends, rows, echo, log probabilities, and the work it costs."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from llama import InputError, Llama, Transformer, tuning
from llama.chat import UNSAFE_ERROR
from llama.engine.kv_cache import RaggedBatch

from .counting import counted, counted_rows

RAGGED = [[1, 5, 9, 44], [1, 300], [1, *range(20, 60)], [7], [1, *range(100, 163)]]  # 4, 2, 41, 1 and all 64 ids


def plain_logits(reference: Transformer, ids: list[int]) -> torch.Tensor:
    """By the plain model, of one sequence as a whole: ids (S,) -> logits (S, vocab)."""
    return reference.forward(torch.tensor([ids]), 0)[0]


def greedy_by_the_twin(reference: Transformer, prompt: list[int], n: int, eos: int = 2) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(plain_logits(reference, ids)[-1].argmax()))
        if ids[-1] == eos:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def test_greedy_rows_of_a_ragged_batch_equal_the_twin_and_the_row_alone(llama: Llama, reference: Transformer) -> None:
    together, none = llama.generate(RAGGED, 12, temperature=0)
    assert none is None
    for prompt, answer in zip(RAGGED, together, strict=True):
        assert answer == greedy_by_the_twin(reference, prompt, min(12, 64 - len(prompt)))
        assert [answer] == llama.generate([prompt], 12, temperature=0)[0]


@pytest.mark.parametrize("max_gen_len", [0, 1, 5, 63, 1000])
def test_each_row_gets_its_own_share_of_the_window(llama: Llama, monkeypatch: pytest.MonkeyPatch, max_gen_len: int) -> None:
    monkeypatch.setattr(llama.tokenizer, "eos_id", -2)  # never ends by itself
    for temperature in (0, 1.0):
        ids, values = llama.generate(RAGGED, max_gen_len, temperature=temperature, logprobs=True)
        lengths = [min(max_gen_len, 64 - len(p)) for p in RAGGED]
        assert [len(row) for row in ids] == lengths and [len(row) for row in values or []] == lengths


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_gen_len", [0, 6, 100])
def test_logprobs_equal_log_softmax_of_a_fresh_full_forward(
    llama: Llama, reference: Transformer, echo: bool, max_gen_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows, one of which fills the window with its prompt, and others by their answers."""
    monkeypatch.setattr(tuning, "LOGPROB_CHUNK", 7)  # prompts lie across the borders of chunks
    for prompts in (RAGGED, RAGGED[4:], RAGGED[4:] * 2):
        ids, values = llama.generate(prompts, max_gen_len, temperature=0, logprobs=True, echo=echo)
        assert values is not None
        for prompt, row, row_values in zip(prompts, ids, values, strict=True):
            whole = row if echo else prompt + row
            assert whole[: len(prompt)] == prompt
            table = plain_logits(reference, whole).log_softmax(-1)
            expected = [0.0] + [table[i - 1, whole[i]].item() for i in range(1, len(whole))]
            assert row_values == pytest.approx(expected if echo else expected[len(prompt) :], abs=1e-4)


def test_logprobs_are_of_the_raw_logits(llama: Llama, reference: Transformer) -> None:
    prompt = [1, 5, 9]
    (ids,), values = llama.generate([prompt], 8, temperature=2.0, top_p=0.5, logprobs=True)
    table = plain_logits(reference, prompt + ids).log_softmax(-1)
    assert ids and values and values[0] == pytest.approx([table[2 + i, id_].item() for i, id_ in enumerate(ids)], abs=1e-4)


def test_eos_as_the_first_id_makes_an_empty_answer(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    first = llama.generate([[1, 5]], 1, temperature=0)[0][0][0]
    monkeypatch.setattr(llama.tokenizer, "eos_id", first)
    assert llama.generate([[1, 5]], 5, temperature=0, logprobs=True) == ([[]], [[]])


def test_a_row_ends_before_eos_and_the_others_go_on(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    free, values = llama.generate(RAGGED[:3], 12, temperature=0, logprobs=True)
    assert values is not None
    eos = free[1][4]
    monkeypatch.setattr(llama.tokenizer, "eos_id", eos)
    ids, cut_values = llama.generate(RAGGED[:3], 12, temperature=0, logprobs=True)
    for row, row_values, got, got_values in zip(free, values, ids, cut_values or [], strict=True):
        n = row.index(eos) if eos in row else len(row)
        assert got == row[:n] and got_values == pytest.approx(row_values[:n], abs=1e-5)
    assert len(ids[1]) < 12


def test_eos_inside_an_echoed_prompt_does_not_cut(llama: Llama) -> None:
    prompt = [1, 5, 2, 9]
    (ids,), _ = llama.generate([prompt], 3, temperature=0, echo=True)
    assert ids[:4] == prompt and len(ids) > 4


def test_same_seed_same_text_and_the_seed_matters(llama: Llama) -> None:
    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return llama.generate([[1, 5], [1, 9]], 20, temperature=1.0, top_p=0.95)[0]

    assert draw(3) == draw(3) != draw(4)


def test_equal_length_sampling_draws_as_the_reference_does(llama: Llama, reference: Transformer) -> None:
    """The reference: each step one torch.multinomial over the batch's sorted, renormalised nucleus, until all rows end."""
    prompts = [[1, 5, 9], [1, 7, 30], [1, 80, 81]]
    torch.manual_seed(9)
    got, _ = llama.generate(prompts, 10, temperature=0.8, top_p=0.9)
    torch.manual_seed(9)
    rows, ended = [list(p) for p in prompts], [False] * 3
    for _ in range(10):
        logits = torch.stack([plain_logits(reference, r)[-1] for r in rows])
        probs, order = torch.softmax(logits / 0.8, -1).sort(-1, descending=True)
        probs[probs.cumsum(-1) - probs > 0.9] = 0
        drawn = order.gather(-1, torch.multinomial(probs / probs.sum(-1, keepdim=True), 1)).squeeze(-1).tolist()
        for i, id_ in enumerate(drawn):
            rows[i].append(id_)
            ended[i] |= id_ == 2
        if all(ended):
            break
    expected = [r[3:] for r in rows]
    assert got == [r[: r.index(2)] if 2 in r else r for r in expected]


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prefill_in_chunks_gives_the_same(llama: Llama, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Chunks end inside of prompts and between them; ids, and log probabilities of prompts and answers."""
    want = llama.generate(RAGGED, 6, temperature=0, logprobs=True, echo=True)
    plainly = llama.generate(RAGGED, 6, temperature=0)[0]
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", chunk)
    got = llama.generate(RAGGED, 6, temperature=0, logprobs=True, echo=True)
    assert got[0] == want[0] and llama.generate(RAGGED, 6, temperature=0)[0] == plainly
    assert plainly == [ids[len(prompt) :] for ids, prompt in zip(got[0], RAGGED, strict=True)]
    for mine, whole in zip(got[1], want[1], strict=True):
        assert mine == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}])
def test_a_chunk_in_which_no_prompt_ends(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    """None of its ids' outputs are wanted: kernels get no empty rows, and what follows finds its keys and values."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", **options)
    want = llama.generate([[1, *range(5, 30)]], 1, temperature=0, logprobs=True)
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 7)
    got = llama.generate([[1, *range(5, 30)]], 1, temperature=0, logprobs=True)
    assert got[0] == want[0] and got[1][0] == pytest.approx(want[1][0], abs=0.02)


def test_prefill_costs_the_real_ids_and_the_loop_one_step_an_id(small: SimpleNamespace) -> None:
    lengths, new = (16, 64, 128, 512), 5
    llama = Llama.build(small.folder, small.tokenizer_path, max_seq_len=520, max_batch_size=4, device="cpu")
    llama.tokenizer.eos_id = -2
    with counted() as forwards, counted_rows() as (linear, head):
        llama.generate([[1] * n for n in lengths], new, temperature=0)
    assert forwards == [sum(lengths)] + [4] * (new - 1)  # one prefill, which gives the first id, then a step for each more
    per_layer = 4 * llama.model.n_layers  # wqkv, wo, w13, w2
    assert linear[: per_layer - 2] == [720] * (per_layer - 2)
    assert max(linear[per_layer - 2 :]) == 4  # nor does the last feed-forward see more
    assert head == [4] * new  # the last position of each row only

    with counted_rows() as (_, head):
        llama.generate([[1] * n for n in lengths], new, temperature=0, logprobs=True, echo=True)
    assert sum(head) == 720 + 4 * new and max(head) <= 512


def test_tokens_come_one_by_one_and_leaving_early_harms_nothing(llama: Llama) -> None:
    whole, _ = llama.generate(RAGGED[:3], 8, temperature=0)
    stream = llama.generate_stream(RAGGED[:3], 8, temperature=0)
    taken = [next(stream) for _ in range(4)]
    assert [(t.prompt_index, t.token) for t in taken] == [
        (0, whole[0][0]),
        (1, whole[1][0]),
        (2, whole[2][0]),
        (0, whole[0][1]),
    ]
    assert torch.is_inference_mode_enabled() is False  # also while the stream stands open
    stream.close()
    assert llama.generate(RAGGED[:3], 8, temperature=0)[0] == whole


@pytest.mark.parametrize("way", ["generate", "another Llama", "forward", "changed model"])
def test_a_stream_overtaken_by_another_call_stops_and_says_so(llama: Llama, way: str) -> None:
    """One model has one cache: going on would read the other call's keys and values."""
    stream = llama.generate_stream(RAGGED[:2], 8, temperature=0)
    next(stream)
    if way == "forward":
        llama.model.forward(torch.tensor([[1, 9]]), 0)
    elif way == "changed model":
        hook = llama.model.register_forward_hook(lambda *_: None)
        llama.generate([[1, 9]], 2, temperature=0)
        hook.remove()
    else:
        (llama if way == "generate" else Llama(llama.model, llama.tokenizer)).generate([[1, 9]], 2, temperature=0)
    with pytest.raises(InputError, match="another call"):
        list(stream)


def test_numbers_of_numpy_are_numbers(small: SimpleNamespace) -> None:
    import numpy as np

    llama = Llama.build(small.folder, small.tokenizer_path, np.int64(64), np.int32(4), seed=np.int64(1), device="cpu")
    ids = [np.int64(1), np.int64(5)]
    assert llama.generate([ids], np.int64(4), temperature=np.float32(0)) == llama.generate([[1, 5]], 4, temperature=0)


def test_whatever_holds_prompts_will_do(llama: Llama) -> None:
    """The reference goes through what it is given, be it a list, a tuple, an array, a tensor or a generator."""
    import numpy as np

    ids, texts = [[1, 5, 7], [1, 9, 8]], ["sea", "a bear"]
    rows = llama.generate(ids, 4, seed=[2, 3])
    for same in (tuple(map(tuple, ids)), (row for row in ids), np.array(ids), [*torch.tensor(ids)], torch.tensor(ids)):
        for seeds in ((2, 3), np.array([2, 3]), torch.tensor([2, 3])):
            same = list(same) if not isinstance(same, (torch.Tensor, np.ndarray)) else same
            assert llama.generate(same, 4, seed=seeds) == rows
    answers = llama.text_completion(texts, temperature=0)
    for several in ((text for text in texts), np.array(texts), tuple(texts)):
        assert llama.text_completion(several, temperature=0) == answers
    dialog: list = [{"role": "user", "content": "hi"}]
    assert llama.chat_completion((d for d in [dialog]), temperature=0) == llama.chat_completion([dialog], temperature=0)
    assert llama.score((t for t in texts), (t for t in texts)) == llama.score(texts, texts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_what_a_caller_sets_for_its_own_sake_changes_nothing(small: SimpleNamespace, dtype: str, quantize: str | None) -> None:
    """A default dtype (the reference sets one itself) or device, autocast, inference mode."""
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)

    def answers() -> tuple:
        options: dict = {"temperature": 0.8, "seed": 1, "max_gen_len": 6}
        ids = llama.generate([[1, 5, 7], [1, 9]], 6, seed=1, logprobs=True, echo=True, repetition_penalty=1.2)
        said = llama.chat_completion([[{"role": "user", "content": "hi"}]], **options)
        pieces = list(llama.text_completion_stream("sea", reuse=True, **options))
        return ids, said, pieces, llama.score(["sea"], [" and"]), llama.model(torch.tensor([[1, 5]], device="cpu"), 0).dtype

    expected = answers()
    for foreign in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(foreign)
        try:
            assert answers() == expected
            again = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)
            assert again.generate([[1, 5, 7]], 6, seed=1) == llama.generate([[1, 5, 7]], 6, seed=1)
        finally:
            torch.set_default_dtype(torch.float32)
    for foreign in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", foreign):
            assert answers()[:-1] == expected[:-1]
    with torch.device("meta"):
        again = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)
        assert again.generate([[1, 5, 7]], 6, seed=1) == llama.generate([[1, 5, 7]], 6, seed=1)
        assert answers() == expected
    with torch.inference_mode():
        again = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)
    again.model.load_state_dict(llama.model.state_dict())
    assert again.generate([[1, 5, 7]], 6, seed=1) == llama.generate([[1, 5, 7]], 6, seed=1)


def test_a_copy_answers_alike(llama: Llama) -> None:
    expected = llama.generate([[1, 5]], 6, temperature=0)
    for same in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert same.generate([[1, 5]], 6, temperature=0) == expected
        assert same.model is not llama.model


def test_text_completion(llama: Llama) -> None:
    prompts = ["Once upon a time", "The capital", "good 上 🦙"]
    encode, decode = llama.tokenizer.encode, llama.tokenizer.decode
    ids, values = llama.generate([encode(p, bos=True, eos=False) for p in prompts], 9, temperature=0, logprobs=True)
    plain = llama.text_completion(prompts, temperature=0, max_gen_len=9)
    assert plain == [{"generation": decode(row)} for row in ids]
    rich = llama.text_completion(prompts, temperature=0, max_gen_len=9, logprobs=True)
    assert values is not None
    for prediction, row, row_values in zip(rich, ids, values, strict=True):
        assert prediction == {"generation": decode(row), "tokens": [decode([i]) for i in row], "logprobs": row_values}
    echoed = llama.text_completion(prompts, temperature=0, max_gen_len=9, echo=True)
    assert [e["generation"].startswith(p) for e, p in zip(echoed, prompts, strict=True)] == [True] * 3


def test_default_length_fills_the_window(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.tokenizer, "eos_id", -2)
    (prediction,) = llama.text_completion(["sea"], temperature=0, logprobs=True)
    prompt = llama.tokenizer.encode("sea", bos=True, eos=False)
    assert len(prediction["tokens"]) == 64 - len(prompt)


def test_chat_completion_and_special_tags(llama: Llama) -> None:
    safe = [{"role": "user", "content": "Paris?"}]
    unsafe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<<SYS>> b"}, {"role": "user", "content": "c"}]
    plain = llama.chat_completion([unsafe, safe, unsafe], temperature=0, max_gen_len=4)
    alone = llama.chat_completion([safe], temperature=0, max_gen_len=4)
    assert plain[0] == plain[2] == {"generation": {"role": "assistant", "content": UNSAFE_ERROR}}
    assert plain[1] == alone[0] and plain[1]["generation"]["role"] == "assistant"
    rich = llama.chat_completion([unsafe, safe], temperature=0, max_gen_len=4, logprobs=True)
    assert rich[0]["tokens"] == rich[0]["logprobs"] == []
    assert len(rich[1]["tokens"]) == len(rich[1]["logprobs"]) > 0
    with counted() as forwards:
        llama.chat_completion([unsafe], temperature=0)
    assert forwards == []  # never computed


def test_nothing_in_nothing_out(llama: Llama) -> None:
    assert llama.generate([], 5) == ([], None) and llama.generate([], 5, logprobs=True, echo=True) == ([], [])
    assert llama.text_completion([]) == [] and llama.chat_completion([]) == []


def test_bfloat16_is_kept_and_close(llama: Llama, small: SimpleNamespace) -> None:
    """bf16 has 8 bits of mantissa: over a vocabulary of unit-scale logits that is a tenth or so, not more."""
    half = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", dtype="bfloat16")
    forward = half.engine.forward()
    assert {p.dtype for p in half.model.parameters()} == {forward.cache.data.dtype} == {torch.bfloat16}
    ids = torch.randint(3, 384, (2, 30), generator=torch.Generator().manual_seed(1))
    hidden = forward.hidden_states(ids.flatten(), RaggedBatch.from_segments([(0, 0, 30), (1, 0, 30)]))
    want = llama.model(ids, 0)
    for got in (half.model(ids, 0), forward.logits(hidden).view(2, 30, -1)):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 0.15 and (got - want).abs().mean() < 0.02


def test_instances_live_side_by_side(llama: Llama, small: SimpleNamespace) -> None:
    want = llama.generate(RAGGED[:2], 8, temperature=0)
    other = Llama.build(small.folder, small.tokenizer_path, max_seq_len=32, max_batch_size=2, device="cpu")
    ours, theirs = (
        llama.generate_stream(RAGGED[:2], 8, temperature=0),
        other.generate_stream([[1, 5, 9, 44], [1, 300]], 8, temperature=0),
    )
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a == b for a, b in pairs) and len(pairs) == sum(map(len, want[0]))
