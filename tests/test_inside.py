"""What programs do to the inside of the model: each is obeyed, or refused with the way out, and nothing is ignored.

A model whose forward a caller has changed is generated with through `Transformer.forward`, on (B, S) tokens, as in the
reference. Each use is tried on plain tensors and on packed ones.
"""

import copy
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from llama import InputError, Llama, ModelArgs, Transformer, generation, model, tuning
from llama import model as reference
from llama.kernels.packed_weight import PackedWeight
from llama.layers import linear

from .support import run

PROMPTS = [[1, 5, 9, 30, 8], [1, 7]]
FORMS = ["plain", "packed", "int8"]


def build(small: SimpleNamespace, form: str = "plain", **options: Any) -> Llama:
    more = {"plain": {}, "packed": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}}[form]
    return Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu", **more, **options)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)  # these weights, too, are packed
    return request.param


@pytest.fixture
def built(small: SimpleNamespace, form: str) -> Llama:
    return build(small, form)


def say(llama: Llama) -> list[list[int]]:
    return llama.generate(PROMPTS, 8, temperature=0)[0]


def most_likely(llama: Llama, answers: list[list[int]]) -> bool:
    """Whether each token's logit is within a tolerance of the largest, by `model.forward` called as in the reference."""
    nearly = 0.05 if next(llama.model.parameters()).dtype == torch.float32 else 0.15
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    before = 0
    for position in range(min(map(len, PROMPTS)), tokens.shape[1]):
        logits = llama.model.forward(tokens[:, before:position], before)[:, -1]
        for row, prompt, of_row in zip(rows, PROMPTS, logits, strict=True):
            if len(prompt) <= position < len(row) and of_row.max() - of_row[row[position]] > nearly:
                return False
        before = position
    return True


# --- looked at ---


def test_modules_parameters_and_state_have_metas_names(built: Llama) -> None:
    model, parts = built.model, ("wq", "wk", "wv", "wo")
    names = [name for name, _ in model.named_parameters()]
    assert names[1:10] == [
        *(f"layers.0.attention.{part}.weight" for part in parts),
        *(f"layers.0.feed_forward.{part}.weight" for part in ("w1", "w2", "w3")),
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
    ]
    assert [*model.state_dict()] == names and sum(p.numel() for p in model.parameters()) == 147_776
    attention = model.layers[0].attention
    assert [list(getattr(attention, part).weight.shape) for part in parts] == [[64, 64], [32, 64], [32, 64], [64, 64]]
    numbers = attention.n_kv_heads, attention.n_local_heads, attention.n_local_kv_heads, attention.n_rep, attention.head_dim
    assert numbers == (4, 8, 4, 2, 8)
    block = model.layers[1]
    assert (block.n_heads, block.dim, block.head_dim, block.layer_id) == (8, 64, 8, 1)
    assert model.freqs_cis.shape == (128, 4) and model.freqs_cis.dtype == torch.complex64


def test_weights_have_their_values(built: Llama, small: SimpleNamespace, form: str) -> None:
    tolerance = 1e-6 if form == "plain" else 0.02
    for name, weight in built.model.state_dict().items():
        torch.testing.assert_close(weight.float(), small.weights[name], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close((2 * weight).float(), 2 * weight.float())
    saved = io.BytesIO()
    torch.save(built.model.state_dict(), saved)
    saved.seek(0)
    for name, weight in torch.load(saved, weights_only=True).items():
        assert type(weight) is torch.Tensor and torch.equal(weight, built.model.state_dict()[name].clone())


def test_a_linear_layer_multiplies_by_the_values_it_shows(built: Llama, form: str) -> None:
    x = torch.randn(2, 5, 64).to(built.model.norm.weight.dtype)
    for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w3"):
        layer = built.model.layers[1].get_submodule(name)
        want = x.float() @ layer.weight.clone().float().T
        torch.testing.assert_close(layer(x).float(), want, atol=1e-5 if form == "plain" else 0.02, rtol=0.02)


def test_the_cache_is_there_to_read_and_write(built: Llama) -> None:
    attention, tokens = built.model.layers[1].attention, torch.tensor([[1, 5, 6, 40], [1, 7, 8, 90]])
    built.model(tokens, 0)
    assert attention.cache_k.shape == (4, 64, 4, 8) and attention.cache_k[:2, :4].abs().sum(-1).min() > 0
    next_, step = torch.tensor([[9], [11]]), built.model(torch.tensor([[9], [11]]), 4)
    for layer in built.model.layers:
        layer.attention.cache_k.zero_()
        layer.attention.cache_v.zero_()
    assert not torch.equal(built.model(next_, 4), step)
    say(built)  # row i of a batch is row i of the cache
    row = PROMPTS[1] + say(built)[1]
    want = built.model(torch.tensor([row]), 0)[0, -1]
    say(built)
    both = [(prompt + answer)[:9] for prompt, answer in zip(PROMPTS, say(built), strict=True)]
    got = built.model(torch.tensor([tokens[8:] for tokens in both]), 8)[1, -1]
    assert built.model(torch.tensor([row[:9]]), 0)[0, -1].argmax() == got.argmax() and want.shape == got.shape


def test_logits_need_no_detach(built: Llama) -> None:
    assert built.model(torch.tensor([[1, 5]]), 0).numpy().shape == (1, 2, 384)


# --- hooks, and what is replaced ---


def zeroed(layer: nn.Module) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.weight.shape[0], bias=False).to(layer.weight.dtype)  # type: ignore[arg-type, union-attr]
    nn.init.zeros_(made.weight)
    return made


class Negative(nn.Module):
    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner, self.params = inner, inner.params

    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        return -self.inner(tokens, start_pos)


class Subclass(Transformer):
    def forward(self, tokens: torch.Tensor, start_pos: int) -> torch.Tensor:
        return -super().forward(tokens, start_pos)


class Skip(nn.Module):
    def forward(self, x: torch.Tensor, start_pos: int, freqs_cis: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return x


class Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, generator = base, torch.Generator().manual_seed(0)
        out, width = base.weight.shape  # type: ignore[union-attr, misc]
        self.a = nn.Parameter(torch.randn(4, width, generator=generator).to(base.weight.dtype))  # type: ignore[arg-type]
        self.b = nn.Parameter(torch.randn(out, 4, generator=generator).to(base.weight.dtype))  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


def replace(llama: Llama, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    for layer in llama.model.layers:
        parent = layer.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], make(layer.get_submodule(name)))


def last_position(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[:, -1] += 0.5
    return y


def patched_block(llama: Llama) -> None:
    block = llama.model.layers[0]
    plain = block.forward
    block.forward = types.MethodType(lambda self, x, *args: plain(x, *args) - 1.5 * x, block)


def patched_forward(llama: Llama) -> None:
    plain = llama.model.forward
    llama.model.forward = lambda tokens, start_pos: -plain(tokens, start_pos)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Llama], Any]] = {
    "a hook that edits the last position": lambda x: x.model.layers[1].register_forward_hook(last_position),
    "a hook on wq": lambda x: x.model.layers[0].attention.wq.register_forward_hook(lambda m, i, y: y * 0),
    "a hook on w3": lambda x: x.model.layers[0].feed_forward.w3.register_forward_hook(lambda m, i, y: y * 0),
    "a hook before the output": lambda x: x.model.output.register_forward_pre_hook(lambda m, i: (i[0] * -1,)),
    "forward replaced": patched_forward,
    "a block's forward replaced": patched_block,
    "a subclass": lambda x: setattr(x.model, "__class__", Subclass),
    "a wrapped model": lambda x: setattr(x, "model", Negative(x.model)),
    "a block replaced": lambda x: x.model.layers.__setitem__(0, Skip()),
    "a layer removed": lambda x: setattr(x.model, "layers", x.model.layers[:-1]),
    "layers appended": lambda x: x.model.layers.extend([copy.deepcopy(x.model.layers[i]) for i in (1, 0)]),
    "wq replaced": lambda x: replace(x, "attention.wq", zeroed),
    "lora around wv": lambda x: replace(x, "attention.wv", Lora),
    "other frequencies": lambda x: setattr(x.model, "freqs_cis", model.precompute_freqs_cis(8, 128, 50.0)),
    "wk pruned": lambda x: prune.l1_unstructured(x.model.layers[0].attention.wk, "weight", 0.9),
    "wo zeroed": lambda x: x.model.layers[0].attention.wo.weight.data.mul_(0),
    "wv set": lambda x: x.model.layers[0].attention.wv.weight.__setitem__(slice(0, 8), 0.5),
    "w1 by name": lambda x: [p.zero_() for name, p in x.model.named_parameters() if ".w1." in name],
    "wo in the state": lambda x: [t.zero_() for name, t in x.model.state_dict().items() if ".wo." in name],
    "wq loaded": lambda x: x.model.load_state_dict({"layers.0.attention.wq.weight": torch.zeros(64, 64)}, strict=False),
    "a layer twice": lambda x: x.model.layers.append(x.model.layers[0]),
    "a bias": lambda x: setattr(
        x.model.output, "bias", nn.Parameter(((torch.arange(384) == 77) * 50.0).to(x.model.norm.weight.dtype))
    ),
    "wq another parameter": lambda x: setattr(
        x.model.layers[0].attention.wq, "weight", nn.Parameter(torch.zeros(64, 64).to(x.model.norm.weight.dtype))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_in_the_answers(built: Llama, change: str) -> None:
    """In those of `generate` as in those of `forward`; the same after the model has been used before."""
    before = say(built)
    with torch.no_grad():
        CHANGES[change](built)
        answers = say(built)
        assert answers != before and most_likely(built, answers)
    assert (
        "".join(built.text_completion_stream("the", 0, max_gen_len=4))
        == built.text_completion(["the"], 0, max_gen_len=4)[0]["generation"]
    )


def test_functions_of_the_model_file_may_be_replaced(built: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    before = say(built)
    for owner, name, other in (
        (model, "apply_rotary_emb", lambda xq, xk, freqs_cis: (xq, xk)),
        (model.Attention, "forward", lambda self, x, *args: x * 0),
        (model.RMSNorm, "_norm", lambda self, x: x),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            answers = say(built)
            assert answers != before and most_likely(built, answers)
    assert say(built) == before


def test_hooks_see_batches_and_it_is_told_once(built: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[int]] = []
    handle = built.model.layers[1].register_forward_hook(lambda module, args, y: seen.append(list(y.shape)))
    want = say(built)
    assert seen[:2] == [[2, 2, 64], [2, 1, 64]] and say(built) == want
    told = "llama: layers.1 has a hook: generating through the model's own forward, which is slower\n"
    assert capsys.readouterr().err == told
    seen.clear()
    built.chat_completion([[{"role": "user", "content": "hi"}]], temperature=0, max_gen_len=4)
    assert len(seen) == 4 and seen[1] == [1, 1, 64]
    handle.remove()
    assert say(built) == want and len(seen) == 4


def test_a_hook_may_ban_tokens(built: Llama) -> None:
    """Logits of -inf beside finite ones are a mask; where all are, or one is NaN, there is nothing to choose."""

    def ban(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[..., ::2] = float("-inf")
        return y

    handle = built.model.output.register_forward_hook(ban)
    assert all(token % 2 for row in say(built) for token in row)
    torch.manual_seed(0)
    assert all(token % 2 for row in built.generate(PROMPTS, 8, temperature=1.0)[0] for token in row)
    _, values = built.generate([[1, 2, 5]], 2, temperature=0, logprobs=True, echo=True)
    assert values and values[0][1] == float("-inf")
    handle.remove()
    for bad in (float("nan"), float("inf")):
        handle = built.model.output.register_forward_hook(
            lambda m, i, y, bad=bad: y.clone().index_fill_(-1, torch.tensor([3]), bad)
        )
        with pytest.raises(ValueError, match="not finite"):
            say(built)
        handle.remove()


def test_calls_go_through_what_the_caller_put_there(built: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate`, `tokenizer` and the sampler are looked up at each call."""
    seen: list[dict[str, Any]] = []

    class Mine(Llama):
        def generate(self, prompt_tokens: Any, **options: Any) -> Any:
            seen.append(options)
            return super().generate(prompt_tokens, **options)

    want = built.text_completion(["the"], 0, max_gen_len=4, logprobs=True)
    built.__class__ = Mine
    assert built.text_completion(["the"], 0, max_gen_len=4, logprobs=True) == want
    assert seen == [{"max_gen_len": 4, "temperature": 0.0, "top_p": 0.9, "logprobs": True}]
    built.generate = lambda prompt_tokens, **options: ([[40, 41, 42, 43]], None)  # type: ignore[method-assign]
    assert built.text_completion(["the"])[0]["generation"] == built.tokenizer.decode([40, 41, 42, 43])
    piece = built.tokenizer.decode([42])
    assert built.text_completion(["the"], stop=piece)[0]["generation"] == built.tokenizer.decode([40, 41, 42]).split(piece)[0]
    with pytest.raises(InputError, match="generate has been replaced, and streams do not go through it"):
        built.text_completion_stream("the")
    del built.generate
    built.__class__ = Llama

    class Shouting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

        def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
            return self.inner.encode("Tom said " + s.upper(), bos=bos, eos=eos)

    shouted = built.text_completion(["Tom said THE"], 0, max_gen_len=4)
    built.tokenizer = Shouting(built.tokenizer)  # type: ignore[assignment]
    assert built.text_completion(["the"], 0, max_gen_len=4) == shouted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "sample_top_p", lambda probs, p: probs.argmin(-1, keepdim=True))
        with pytest.raises(InputError, match="seed is for this library's sample_top_p"):
            built.generate([[1, 5]], 1, temperature=0.7, seed=3)
    monkeypatch.setattr(generation, "sample_top_p", lambda probs, p: probs.argmin(-1, keepdim=True))
    tokens = built.generate([[1, 5]], 1, temperature=0.7)[0][0]
    assert tokens == [int(built.model(torch.tensor([[1, 5]]), 0)[0, -1].argmin())]


def test_a_callers_own_decode_makes_the_text(built: Llama) -> None:
    """Of answers, echoes, streams, dialogs and single tokens."""

    class Shouting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

        def decode(self, ids: list[int]) -> str:
            return self.inner.decode(ids).upper()

    dialog = [{"role": "user", "content": "hi"}]

    def texts() -> list[str]:
        whole = built.text_completion(["the", "once upon"], 0, max_gen_len=6, echo=True, logprobs=True)
        said = built.chat_completion([dialog], 0, max_gen_len=6)[0]["generation"]["content"]
        stream = "".join(built.text_completion_stream("the", 0, max_gen_len=6))
        return [*(w["generation"] for w in whole), *whole[0]["tokens"], said, stream]

    plain = texts()
    built.tokenizer = Shouting(built.tokenizer)  # type: ignore[assignment]
    assert texts() == [text.upper() for text in plain] != plain


def test_settings_are_looked_up_at_each_call(built: Llama) -> None:
    answer = say(built)[0]
    built.model.params.max_seq_len = 9
    assert built.generate(PROMPTS[:1], 50, temperature=0)[0] == [answer[:4]]
    built.tokenizer.eos_id = answer[2]
    assert built.generate(PROMPTS[:1], 50, temperature=0)[0] == [answer[: answer.index(answer[2])]]


# --- packed weights ---


@pytest.mark.parametrize("form", ["packed", "int8"], indirect=True)
def test_what_a_packed_weight_cannot_do_it_refuses(built: Llama) -> None:
    """With the way out; never in silence."""
    weight = built.model.layers[0].attention.wq.weight
    assert isinstance(weight, PackedWeight) and isinstance(weight, nn.Parameter)
    for use in (
        lambda: weight[0].zero_(),
        lambda: weight.t(),
        lambda: weight.view(-1),
        lambda: weight.requires_grad_(),
        lambda: setattr(weight, "data", torch.zeros(64, 64)),
    ):
        with pytest.raises(InputError, match='build with backend="eager", which keeps plain tensors'):
            use()


def test_packed_weights_import_nothing_heavy(small: SimpleNamespace) -> None:
    """PyTorch's distributed tensors, and sympy with them, take 40 MB, and most of a second of each start."""
    code = (
        f"import sys; from llama import Llama; paths = {str(small.folder)!r}, {str(small.tokenizer_path)!r}\n"
        "llama = Llama.build(*paths, 64, 2, device='cpu', quantize='int8'); llama.generate([[1, 5]], 2)\n"
        "print(type(llama.model.output.weight).__name__, 'sympy' in sys.modules)"
    )
    assert run("-c", code).stdout == "PackedWeight False\n"


@pytest.mark.parametrize("form", ["packed", "int8"], indirect=True)
def test_an_edit_leaves_the_neighbors_as_they_are(built: Llama) -> None:
    """wq, wk and wv are packed as one."""
    attention = built.model.layers[0].attention
    before = attention.wq.weight.clone(), attention.wv.weight.clone()
    attention.wk.weight.mul_(2)
    assert torch.equal(attention.wq.weight.clone(), before[0]) and torch.equal(attention.wv.weight.clone(), before[1])


def test_copies_are_apart(built: Llama) -> None:
    want = say(built)
    for other in (copy.deepcopy(built.model), pickle.loads(pickle.dumps(built.model))):
        twin = Llama(other, built.tokenizer)
        assert say(twin) == want
        other.layers[0].attention.wo.weight.mul_(0)
        assert say(twin) != want and say(built) == want


def test_eager_keeps_plain_tensors(small: SimpleNamespace, form: str) -> None:
    eager = build(small, form, backend="eager")
    assert all(type(p) is nn.Parameter for p in eager.model.parameters()) and eager.backend == "eager"
    assert most_likely(eager, say(eager))


@pytest.mark.parametrize("form", ["packed", "int8"], indirect=True)
def test_operations_that_write_into_a_packed_weight_are_obeyed(built: Llama) -> None:
    weight = built.model.layers[0].attention.wo.weight
    before = weight.clone().float()
    torch.mul(weight, 2, out=weight)
    torch._foreach_mul_([weight], 2)
    weight.data.add_(weight.clone(), alpha=-0.5)
    torch.testing.assert_close(weight.clone().float(), 2 * before, atol=0.02, rtol=0.02)


def test_what_a_model_was_not_built_for_is_an_error_before_any_work(built: Llama) -> None:
    say(built)
    built.model.params.max_seq_len = 128
    with pytest.raises(InputError, match="max_seq_len is 128, but the model was built with a cache for 64: build it anew"):
        say(built)
    with pytest.raises(InputError, match="max_seq_len is 128"):
        built.score(["the"], [" fox"])


def test_two_streams_do_not_mix_in_a_changed_model(built: Llama) -> None:
    built.model.layers[0].register_forward_hook(lambda module, args, y: None)
    stream = built.generate_stream(PROMPTS[:1], 8, 0)
    next(stream)
    say(built)
    with pytest.raises(InputError, match="another call has used this model's cache"):
        list(stream)


def test_edited_weights_end_a_reuse(built: Llama) -> None:
    def turn(reuse: bool) -> str:
        return "".join(built.text_completion_stream("once upon a time", 0, max_gen_len=6, reuse=reuse))

    turn(True)
    for layer in built.model.layers:
        layer.attention.wv.weight.mul_(-2)
    assert turn(True) == turn(False)


def test_training_after_answering(small: SimpleNamespace) -> None:
    model = build(small, backend="eager").model.double()
    Llama(model, build(small).tokenizer).generate(PROMPTS, 2)
    model.requires_grad_(True)
    model(torch.tensor([[1, 5, 9]]), 0).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- made by hand ---


def test_a_model_made_by_hand_draws_nothing_and_answers() -> None:
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=64, max_seq_len=16, max_batch_size=2))
    assert torch.equal(torch.rand(1), want) and model(torch.tensor([[1, 2]]), 0).numpy().shape == (1, 2, 64)
    column = linear.ColumnParallelLinear(8, 16, bias=False, gather_output=False, init_method=lambda w: w)
    assert column.weight.shape == (16, 8)
    ffn = reference.FeedForward(dim=8, hidden_dim=32, multiple_of=8, ffn_dim_multiplier=None)
    assert ffn.w1.weight.shape == (24, 8) and ffn.w2.weight.shape == (8, 24)
    with pytest.raises(InputError, match="bias=True"):
        linear.ColumnParallelLinear(8, 16, bias=True)


def test_any_pth_files_are_shards(small: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "finetuned.pth").write_bytes((small.folder / "consolidated.00.pth").read_bytes())
    (tmp_path / "params.json").write_bytes((small.folder / "params.json").read_bytes())
    renamed = Llama.build(tmp_path, small.tokenizer_path, 64, 4, device="cpu")
    assert say(renamed) == say(build(small))
