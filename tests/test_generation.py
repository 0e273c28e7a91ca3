"""Test generation: lengths of answers, EOS, rows of a batch, echo, log probabilities, sampling, and the amount of
computation."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from llama import InputError, Llama, Transformer, tuning
from llama.chat import UNSAFE_ERROR
from llama.engine.kv_cache import RaggedBatch

from .counting import count_forward_tokens, count_matmul_rows

RAGGED = [
    [1, 5, 9, 44],
    [1, 300],
    [1, *range(20, 60)],
    [7],
    [1, *range(100, 163)],
]  # prompts of 4, 2, 41, 1 and 64 tokens; the context length is 64


def reference_logits(reference: Transformer, tokens: list[int]) -> torch.Tensor:
    """Return the reference model's logits (S, vocab) for one whole sequence of S tokens."""
    return reference.forward(torch.tensor([tokens]), 0)[0]


def greedy_by_reference(reference: Transformer, prompt: list[int], n: int, eos: int = 2) -> list[int]:
    """Return the greedy answer of the reference model to a prompt: at most n tokens, up to EOS, which is left out."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(reference_logits(reference, tokens)[-1].argmax()))
        if tokens[-1] == eos:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_greedy_answers_of_a_ragged_batch_equal_the_reference_and_each_prompt_alone(
    llama: Llama, reference: Transformer
) -> None:
    answers, logprobs = llama.generate(RAGGED, 12, temperature=0)
    assert logprobs is None
    for prompt, answer in zip(RAGGED, answers, strict=True):
        assert answer == greedy_by_reference(reference, prompt, min(12, 64 - len(prompt)))
        assert [answer] == llama.generate([prompt], 12, temperature=0)[0]


@pytest.mark.parametrize("max_gen_len", [0, 1, 5, 63, 1000])
def test_an_answer_ends_at_max_gen_len_or_the_end_of_the_context(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, max_gen_len: int
) -> None:
    monkeypatch.setattr(llama.tokenizer, "eos_id", -2)  # -2 is not a token, so no answer ends at EOS
    for temperature in (0, 1.0):
        tokens, logprobs = llama.generate(RAGGED, max_gen_len, temperature=temperature, logprobs=True)
        lengths = [min(max_gen_len, 64 - len(p)) for p in RAGGED]
        assert [len(row) for row in tokens] == lengths and [len(row) for row in logprobs or []] == lengths


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("max_gen_len", [0, 6, 100])
def test_logprobs_equal_the_log_softmax_of_a_full_forward_of_the_reference(
    llama: Llama, reference: Transformer, echo: bool, max_gen_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test prompts of several lengths, one of which fills the context, and answers that end at the end of the context."""
    monkeypatch.setattr(tuning, "LOGPROB_CHUNK", 7)  # the log probabilities of a long prompt are computed in several chunks
    for prompts in (RAGGED, RAGGED[4:], RAGGED[4:] * 2):
        tokens, logprobs = llama.generate(prompts, max_gen_len, temperature=0, logprobs=True, echo=echo)
        assert logprobs is not None
        for prompt, row, row_logprobs in zip(prompts, tokens, logprobs, strict=True):
            sequence = row if echo else prompt + row
            assert sequence[: len(prompt)] == prompt
            table = reference_logits(reference, sequence).log_softmax(-1)
            expected = [0.0] + [table[i - 1, sequence[i]].item() for i in range(1, len(sequence))]
            assert row_logprobs == pytest.approx(expected if echo else expected[len(prompt) :], abs=1e-4)


def test_logprobs_do_not_depend_on_temperature_and_top_p(llama: Llama, reference: Transformer) -> None:
    prompt = [1, 5, 9]
    (tokens,), logprobs = llama.generate([prompt], 8, temperature=2.0, top_p=0.5, logprobs=True)
    table = reference_logits(reference, prompt + tokens).log_softmax(-1)
    expected = [table[2 + i, token].item() for i, token in enumerate(tokens)]
    assert tokens and logprobs and logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_eos_as_the_first_token_makes_an_empty_answer(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    first = llama.generate([[1, 5]], 1, temperature=0)[0][0][0]
    monkeypatch.setattr(llama.tokenizer, "eos_id", first)
    assert llama.generate([[1, 5]], 5, temperature=0, logprobs=True) == ([[]], [[]])


def test_a_row_ends_before_eos_and_other_rows_continue(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    full_rows, full_logprobs = llama.generate(RAGGED[:3], 12, temperature=0, logprobs=True)
    assert full_logprobs is not None
    eos = full_rows[1][4]
    monkeypatch.setattr(llama.tokenizer, "eos_id", eos)
    rows, logprobs = llama.generate(RAGGED[:3], 12, temperature=0, logprobs=True)
    for full_row, full_row_logprobs, row, row_logprobs in zip(full_rows, full_logprobs, rows, logprobs or [], strict=True):
        n = full_row.index(eos) if eos in full_row else len(full_row)
        assert row == full_row[:n] and row_logprobs == pytest.approx(full_row_logprobs[:n], abs=1e-5)
    assert len(rows[1]) < 12


def test_eos_inside_an_echoed_prompt_does_not_end_the_answer(llama: Llama) -> None:
    prompt = [1, 5, 2, 9]
    (tokens,), _ = llama.generate([prompt], 3, temperature=0, echo=True)
    assert tokens[:4] == prompt and len(tokens) > 4


def test_the_seed_of_torchs_generator_decides_the_answers(llama: Llama) -> None:
    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return llama.generate([[1, 5], [1, 9]], 20, temperature=1.0, top_p=0.95)[0]

    assert sampled(3) == sampled(3) != sampled(4)


def test_prompts_of_equal_length_are_sampled_as_by_the_reference(llama: Llama, reference: Transformer) -> None:
    """Compare with a copy of Meta's generation loop. Each step sorts the probabilities, renormalizes the top-p nucleus, and
    samples a token for every row with a single call of torch.multinomial."""
    prompts = [[1, 5, 9], [1, 7, 30], [1, 80, 81]]
    torch.manual_seed(9)
    got, _ = llama.generate(prompts, 10, temperature=0.8, top_p=0.9)
    torch.manual_seed(9)
    rows, ended = [list(p) for p in prompts], [False] * 3
    for _ in range(10):
        logits = torch.stack([reference_logits(reference, r)[-1] for r in rows])
        probs, order = torch.softmax(logits / 0.8, -1).sort(-1, descending=True)
        probs[probs.cumsum(-1) - probs > 0.9] = 0
        sampled = order.gather(-1, torch.multinomial(probs / probs.sum(-1, keepdim=True), 1)).squeeze(-1).tolist()
        for i, token in enumerate(sampled):
            rows[i].append(token)
            ended[i] |= token == 2
        if all(ended):
            break
    expected = [r[3:] for r in rows]
    assert got == [r[: r.index(2)] if 2 in r else r for r in expected]


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_prefill_in_chunks_changes_neither_tokens_nor_logprobs(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Prefill prompts in chunks, some of which end inside a prompt and some between two prompts."""
    want = llama.generate(RAGGED, 6, temperature=0, logprobs=True, echo=True)
    want_answers = llama.generate(RAGGED, 6, temperature=0)[0]
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", chunk)
    got = llama.generate(RAGGED, 6, temperature=0, logprobs=True, echo=True)
    assert got[0] == want[0] and llama.generate(RAGGED, 6, temperature=0)[0] == want_answers
    assert want_answers == [tokens[len(prompt) :] for tokens, prompt in zip(got[0], RAGGED, strict=True)]
    for row_logprobs, want_logprobs in zip(got[1], want[1], strict=True):
        assert row_logprobs == pytest.approx(want_logprobs, abs=1e-4)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"quantize": "int4"}])
def test_a_prefill_chunk_in_which_no_prompt_ends_changes_no_answer(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """Prefill a prompt in chunks, of which only the last one needs logits. For the other chunks, kernels must not get an empty
    input."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", **options)
    want = llama.generate([[1, *range(5, 30)]], 1, temperature=0, logprobs=True)
    monkeypatch.setattr(tuning, "PREFILL_CHUNK", 7)
    got = llama.generate([[1, *range(5, 30)]], 1, temperature=0, logprobs=True)
    assert got[0] == want[0] and got[1][0] == pytest.approx(want[1][0], abs=0.02)


def test_prefill_computes_no_padding_and_each_further_token_takes_one_decode_step(small: SimpleNamespace) -> None:
    lengths, new = (16, 64, 128, 512), 5
    llama = Llama.build(small.folder, small.tokenizer_path, max_seq_len=520, max_batch_size=4, device="cpu")
    llama.tokenizer.eos_id = -2
    with count_forward_tokens() as forwards, count_matmul_rows() as (linear, head):
        llama.generate([[i + 1] * n for i, n in enumerate(lengths)], new, temperature=0)
    # The prefill gives the first new token of each row, and each decode step gives one more.
    assert forwards == [sum(lengths)] + [4] * (new - 1)
    # Each layer computes four products: wq, wk and wv share one, w1 and w3 share one, and wo and w2 have one each.
    per_layer = 4 * llama.model.n_layers
    assert linear[: per_layer - 2] == [720] * (per_layer - 2)
    assert max(linear[per_layer - 2 :]) == 4  # the last layer's feed-forward computes one position of each row
    assert head == [4] * new  # logits are computed for one position of each row

    with count_matmul_rows() as (_, head):
        llama.generate([[1] * n for n in lengths], new, temperature=0, logprobs=True, echo=True)
    assert sum(head) == 720 - 4 + 4 * new and max(head) <= 512


def test_generate_stream_yields_tokens_one_by_one_and_may_be_closed_early(llama: Llama) -> None:
    answers, _ = llama.generate(RAGGED[:3], 8, temperature=0)
    stream = llama.generate_stream(RAGGED[:3], 8, temperature=0)
    first_four = [next(stream) for _ in range(4)]
    assert [(t.prompt_index, t.token) for t in first_four] == [
        (0, answers[0][0]),
        (1, answers[1][0]),
        (2, answers[2][0]),
        (0, answers[0][1]),
    ]
    assert torch.is_inference_mode_enabled() is False  # a suspended stream must not leave inference mode on
    stream.close()
    assert llama.generate(RAGGED[:3], 8, temperature=0)[0] == answers


@pytest.mark.parametrize("other_call", ["forward", "modified model"])
def test_a_stream_raises_after_the_models_own_forward_has_used_the_kv_cache(llama: Llama, other_call: str) -> None:
    """`Transformer.forward` writes into the first rows of the KV cache, which are the stream's."""
    stream = llama.generate_stream(RAGGED[:2], 8, temperature=0)
    next(stream)
    if other_call == "forward":
        llama.model.forward(torch.tensor([[1, 9]]), 0)
    else:
        hook = llama.model.register_forward_hook(lambda *_: None)
        llama.generate([[1, 9]], 2, temperature=0)
        hook.remove()
    why = "the model's forward, or code of yours, has written" if other_call == "forward" else "generate has been called since"
    with pytest.raises(InputError, match=why):
        list(stream)


def test_arguments_may_be_numpy_scalars(small: SimpleNamespace) -> None:
    import numpy as np

    llama = Llama.build(small.folder, small.tokenizer_path, np.int64(64), np.int32(4), seed=np.int64(1), device="cpu")
    tokens = [np.int64(1), np.int64(5)]
    assert llama.generate([tokens], np.int64(4), temperature=np.float32(0)) == llama.generate([[1, 5]], 4, temperature=0)


def test_prompts_and_seeds_may_be_any_iterable(llama: Llama) -> None:
    """Pass prompts as a list, tuple, NumPy array, tensor or generator, all of which the reference accepts too."""
    import numpy as np

    tokens, texts = [[1, 5, 7], [1, 9, 8]], ["sea", "a bear"]
    want = llama.generate(tokens, 4, seed=[2, 3])
    tensor = torch.tensor(tokens)
    for prompts in (tuple(map(tuple, tokens)), (row for row in tokens), np.array(tokens), [*tensor], tensor):
        for seeds in ((2, 3), np.array([2, 3]), torch.tensor([2, 3])):
            prompts = list(prompts) if not isinstance(prompts, (torch.Tensor, np.ndarray)) else prompts
            assert llama.generate(prompts, 4, seed=seeds) == want
    answers = llama.text_completion(texts, temperature=0)
    for text_prompts in ((text for text in texts), np.array(texts), tuple(texts)):
        assert llama.text_completion(text_prompts, temperature=0) == answers
    dialog: list = [{"role": "user", "content": "hi"}]
    assert llama.chat_completion((d for d in [dialog]), temperature=0) == llama.chat_completion([dialog], temperature=0)
    assert llama.score((t for t in texts), (t for t in texts)) == llama.score(texts, texts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_torch_settings_of_the_caller_change_no_answer(small: SimpleNamespace, dtype: str, quantize: str | None) -> None:
    """Generate while the caller has set a default dtype, a default device, autocast or inference mode. Meta's `Llama.build`
    sets a default dtype itself."""
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)

    def answers() -> tuple:
        options: dict = {"temperature": 0.8, "seed": 1, "max_gen_len": 6}
        tokens = llama.generate([[1, 5, 7], [1, 9]], 6, seed=1, logprobs=True, echo=True, repetition_penalty=1.2)
        reply = llama.chat_completion([[{"role": "user", "content": "hi"}]], **options)
        chunks = list(llama.text_completion_stream("sea", **options))
        return tokens, reply, chunks, llama.score(["sea"], [" and"]), llama.model(torch.tensor([[1, 5]], device="cpu"), 0).dtype

    expected = answers()
    for default_dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(default_dtype)
        try:
            assert answers() == expected
            again = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)
            assert again.generate([[1, 5, 7]], 6, seed=1) == llama.generate([[1, 5, 7]], 6, seed=1)
        finally:
            torch.set_default_dtype(torch.float32)
    for autocast_dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", autocast_dtype):
            assert answers()[:-1] == expected[:-1]
    with torch.device("meta"):
        again = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)
        assert again.generate([[1, 5, 7]], 6, seed=1) == llama.generate([[1, 5, 7]], 6, seed=1)
        assert answers() == expected
    with torch.inference_mode():
        again = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype, quantize=quantize)
    again.model.load_state_dict(llama.model.state_dict())
    assert again.generate([[1, 5, 7]], 6, seed=1) == llama.generate([[1, 5, 7]], 6, seed=1)


def test_a_copied_or_pickled_llama_gives_the_same_answers(llama: Llama) -> None:
    expected = llama.generate([[1, 5]], 6, temperature=0)
    for duplicate in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert duplicate.generate([[1, 5]], 6, temperature=0) == expected
        assert duplicate.model is not llama.model


def test_text_completion_decodes_the_tokens_of_generate(llama: Llama) -> None:
    prompts = ["Once upon a time", "The capital", "good 上 🦙"]
    encode, decode = llama.tokenizer.encode, llama.tokenizer.decode
    tokens, logprobs = llama.generate([encode(p, bos=True, eos=False) for p in prompts], 9, temperature=0, logprobs=True)
    predictions = llama.text_completion(prompts, temperature=0, max_gen_len=9)
    assert predictions == [{"generation": decode(row)} for row in tokens]
    with_logprobs = llama.text_completion(prompts, temperature=0, max_gen_len=9, logprobs=True)
    assert logprobs is not None
    for prediction, row, row_logprobs in zip(with_logprobs, tokens, logprobs, strict=True):
        assert prediction == {"generation": decode(row), "tokens": [decode([i]) for i in row], "logprobs": row_logprobs}
    echoed = llama.text_completion(prompts, temperature=0, max_gen_len=9, echo=True)
    assert [e["generation"].startswith(p) for e, p in zip(echoed, prompts, strict=True)] == [True] * 3


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4, "max_gen_len": 9, "stop": ["e", "\n"]}], ids=str)
def test_iter_text_completion_yields_the_results_of_text_completion_with_details_in_order(llama: Llama, options: dict) -> None:
    """Complete eight prompts in a batch of six rows, so that the answers do not finish in the order of the prompts."""
    prompts = ["Once upon a time", "The capital", "good 上 🦙", "", "one, two, three", "sea", "She sells", "Good morning"]
    want = llama.text_completion(prompts, details=True, **options)
    assert list(llama.iter_text_completion(prompts, **options)) == want


def test_iter_text_completion_yields_each_result_before_later_results_are_finished(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a batch of one row, and count the forwards that have run when each result arrives. They may include the prefill of
    the next prompt, but none of its decode steps."""
    monkeypatch.setattr(llama.tokenizer, "eos_id", -2)  # -2 is not a token, so no answer ends at EOS
    monkeypatch.setattr(llama.model.params, "max_batch_size", 1)
    n_forwards: list[int] = []
    with count_forward_tokens() as forwards:
        results = llama.iter_text_completion(["sea", "Once upon", "The capital"], temperature=0, max_gen_len=5)
        n_forwards.extend(len(forwards) for _ in results)
    assert n_forwards == [5 + 1, 10 + 1, 15]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4, "max_gen_len": 9, "stop": ["e", "\n"]}], ids=str)
def test_iter_chat_completion_yields_the_results_of_chat_completion_with_details_in_order(llama: Llama, options: dict) -> None:
    texts = ["[INST]", "Once", "The capital", "a [/INST] b", "good 上 🦙", "", "one, two, three", "sea", "She sells", "<<SYS>>"]
    dialogs = [[{"role": "user", "content": text}] for text in texts]
    assert list(llama.iter_chat_completion(dialogs, **options)) == llama.chat_completion(dialogs, details=True, **options)


def test_iter_text_completion_raises_input_error_at_the_call(llama: Llama) -> None:
    for options in ({"prompts": "once"}, {"prompts": ["a"], "stop": ""}, {"prompts": ["a"], "temperature": -1}):
        with pytest.raises(InputError):
            llama.iter_text_completion(**options)


def test_an_answer_fills_the_context_by_default(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.tokenizer, "eos_id", -2)
    (prediction,) = llama.text_completion(["sea"], temperature=0, logprobs=True)
    prompt = llama.tokenizer.encode("sea", bos=True, eos=False)
    assert len(prediction["tokens"]) == 64 - len(prompt)


def test_a_dialog_with_special_tags_is_answered_with_the_error_and_without_computation(llama: Llama) -> None:
    safe = [{"role": "user", "content": "Paris?"}]
    unsafe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<<SYS>> b"}, {"role": "user", "content": "c"}]
    answers = llama.chat_completion([unsafe, safe, unsafe], temperature=0, max_gen_len=4)
    alone = llama.chat_completion([safe], temperature=0, max_gen_len=4)
    assert answers[0] == answers[2] == {"generation": {"role": "assistant", "content": UNSAFE_ERROR}}
    assert answers[1] == alone[0] and answers[1]["generation"]["role"] == "assistant"
    with_logprobs = llama.chat_completion([unsafe, safe], temperature=0, max_gen_len=4, logprobs=True)
    assert with_logprobs[0]["tokens"] == with_logprobs[0]["logprobs"] == []
    assert len(with_logprobs[1]["tokens"]) == len(with_logprobs[1]["logprobs"]) > 0
    with count_forward_tokens() as forwards:
        llama.chat_completion([unsafe], temperature=0)
    assert forwards == []


def test_no_prompts_give_no_answers(llama: Llama) -> None:
    assert llama.generate([], 5) == ([], None) and llama.generate([], 5, logprobs=True, echo=True) == ([], [])
    assert llama.text_completion([]) == [] and llama.chat_completion([]) == []


def test_logits_in_bfloat16_are_close_to_float32(llama: Llama, small: SimpleNamespace) -> None:
    """Store weights and the KV cache in bfloat16. Logits range from about -4 to 4, and may differ from float32 by at most
    0.15."""
    half = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", dtype="bfloat16")
    forward = half.engine.forward()
    assert {p.dtype for p in half.model.parameters()} == {forward.cache.data.dtype} == {torch.bfloat16}
    tokens = torch.randint(3, 384, (2, 30), generator=torch.Generator().manual_seed(1))
    hidden = forward.hidden_states(tokens.flatten(), RaggedBatch.from_segments([(0, 0, 30), (1, 0, 30)]))
    want = llama.model(tokens, 0)
    for got in (half.model(tokens, 0), forward.logits(hidden).view(2, 30, -1)):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 0.15 and (got - want).abs().mean() < 0.02


def test_two_models_in_one_process_do_not_affect_each_other(llama: Llama, small: SimpleNamespace) -> None:
    want = llama.generate(RAGGED[:2], 8, temperature=0)
    other = Llama.build(small.folder, small.tokenizer_path, max_seq_len=32, max_batch_size=2, device="cpu")
    first_stream = llama.generate_stream(RAGGED[:2], 8, temperature=0)
    second_stream = other.generate_stream(RAGGED[:2], 8, temperature=0)
    pairs = list(zip(first_stream, second_stream, strict=True))
    assert all(a == b for a, b in pairs) and len(pairs) == sum(map(len, want[0]))
