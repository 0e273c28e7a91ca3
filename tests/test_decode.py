"""The decode step as it is captured, seen without a GPU: static memory, any positions, the same ids as the plain step; and
the CPU's own step, the same to the digit."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from llama import Llama, avx2, decode, native, widened
from llama.cache import Batch
from llama.decode import Step, bucket, unwatched
from llama.errors import DeviceError, InputError
from llama.host import HostStep
from llama.model import FeedForward, RMSNorm, untouched
from llama.parallel import JoinedColumnParallelLinear, ParallelLinear, RowParallelLinear

PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, 80, 81]]


def test_buckets_double_and_end_with_the_window() -> None:
    assert [bucket(end, 1000) for end in (1, 128, 129, 256, 257, 512, 513, 1000)] == [128, 128, 256, 256, 512, 512, 1000, 1000]
    assert bucket(3, 64) == 64


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[1, 5], [1, 9]]])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_static_steps_and_late_reading_give_the_same_ids(
    llama: Llama, request: pytest.FixtureRequest, prompts: list[list[int]], temperature: float
) -> None:
    """As on CUDA: steps over a bucket with a mask, and each launched before the ids of the one before are read."""

    def answer() -> tuple:
        torch.manual_seed(5)
        return llama.generate(prompts, 58, temperature=temperature, logprobs=True)

    want = answer()
    request.getfixturevalue("as_on_cuda")
    got = answer()
    assert got[0] == want[0]
    for row, expected in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert llama.engine.decoder.steps.keys() == {(len(prompts), 64)}


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("positions", [[9], [4, 4, 4], [7, 2, 4], [7, 4, 4, 0, 2]])
def test_a_host_step_is_its_twin_to_the_digit(
    small: SimpleNamespace, dtype: str, kind: str | None, positions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, and the keys and values that it leaves; of one row, of rows side by side, and of ragged ones; an
    idle row stands at 0."""
    monkeypatch.setattr(widened, "SMALLEST", 0)  # these weights, too, are packed
    llama = Llama.build(small.folder, small.tokenizer_path, 16, 5, device="cpu", dtype=dtype, quantize=kind)
    model, found = llama.model, []
    ids, batch = torch.arange(20, 20 + len(positions)), Batch.of((row, position, 1) for row, position in enumerate(positions))
    with torch.inference_mode():
        for plain in (True, False):
            model.allocate()
            for row, position in enumerate(positions):
                if position:
                    model.hidden(torch.arange(30, 30 + position), Batch.of([(row, 0, position)]))
            if plain:
                hidden = model.hidden(ids, batch)
            else:
                assert unwatched(model)
                hidden = HostStep(model, len(ids))(ids, batch)
            found.append((model.logits(hidden), model.ready_cache().data))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][0].isfinite().all() and found[0][1][:, :, 0, :, positions[0]].any()


def test_what_a_caller_puts_into_a_layer_is_in_its_steps(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook, a function in forward's place, another module: each sees every step."""
    block, seen = llama.model.layers[0], []
    plain = block.feed_forward.forward

    class Other(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return plain(x)

    def answer() -> list[list[int]]:
        seen.clear()
        return llama.generate([[1, 5, 9]], 6, temperature=0)[0]

    want = answer()
    assert unwatched(llama.model) and not seen
    handle = block.feed_forward.w2.register_forward_hook(lambda module, args, y: seen.append(len(y)))
    assert answer() == want and seen == [3, 1, 1, 1, 1, 1]
    handle.remove()
    kept: list[torch.Tensor] = []
    handle = llama.model.tok_embeddings.register_forward_hook(lambda module, args, y: kept.extend((y, y.clone())))
    assert answer() == want and all(torch.equal(a, b) for a, b in zip(kept[::2], kept[1::2], strict=True))
    handle.remove()
    block.feed_forward.forward = Other().forward
    assert answer() == want and seen == [3, 1, 1, 1, 1, 1]
    del block.feed_forward.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            FeedForward, "forward", lambda self, x, forward=FeedForward.forward: (seen.append(len(x)), forward(self, x))[1]
        )
        assert answer() == want and seen == [3, *[1] * 11]  # of the last layer only what is wanted
    block.feed_forward.forward = block.feed_forward.forward  # as pytest's monkeypatch puts it back
    assert unwatched(llama.model)
    block.feed_forward.forward = llama.model.layers[1].feed_forward.forward
    assert not unwatched(llama.model)
    del block.feed_forward.forward
    for part, name in ((block.feed_forward, "gated"), (block.attention, "attend"), (llama.model, "logits")):
        method = getattr(part, name)
        setattr(part, name, lambda *args, method=method: (seen.append(0), method(*args))[1])
        assert answer() == want and len(seen) == 6
        delattr(part, name)
    own, block.feed_forward = block.feed_forward, Other()
    assert answer() == want and seen == [3, 1, 1, 1, 1, 1]
    block.feed_forward = own
    assert answer() == want and not seen


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [32, 96])
def test_a_layer_may_be_narrower_than_the_others(
    small: SimpleNamespace, dtype: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pruning leaves it. What steps know of all layers is not true of it."""
    monkeypatch.setattr(widened, "SMALLEST", 0)
    llama = Llama.build(small.folder, small.tokenizer_path, 32, 2, device="cpu", dtype=dtype)
    before = llama.generate([[1, 5, 9]], 8, temperature=0)
    ffn, (w1, w3) = llama.model.layers[1].feed_forward, (small.weights[f"layers.1.feed_forward.w{i}.weight"] for i in (1, 3))
    w2 = small.weights["layers.1.feed_forward.w2.weight"]
    ffn.w13 = JoinedColumnParallelLinear(w1.shape[1], {"w1": width, "w3": width})
    ffn.w13.hold(torch.cat((w1[:width], w3[:width])).to(llama.model.dtype))
    ffn.w2 = RowParallelLinear(width, len(w2))
    ffn.w2.hold(w2[:, :width].contiguous().to(llama.model.dtype))
    ids, wanted = [1, 5, 9], []
    for _ in range(8):
        wanted.append(int(llama.model(torch.tensor([[*ids, *wanted]]), 0)[0, -1].argmax()))
    got = llama.generate([ids], 8, temperature=0)
    assert got == ([wanted], None) != before


def test_a_watched_model_is_not_captured(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph calls no Python: a hook would see one step of each size."""
    monkeypatch.setattr(llama.engine.decoder, "static", True)
    want = llama.generate([[1, 5, 9]], 6, temperature=0)
    assert llama.engine.decoder.steps
    llama.engine.decoder.steps.clear()
    seen: list[int] = []
    handle = llama.model.layers[1].attention.register_forward_hook(lambda module, args, y: seen.append(len(y)))
    assert llama.generate([[1, 5, 9]], 6, temperature=0) == want
    handle.remove()
    assert seen == [3, 1, 1, 1, 1, 1] and not llama.engine.decoder.steps
    assert llama.generate([[1, 5, 9]], 6, temperature=0) == want and llama.engine.decoder.steps


def test_float64_steps_too(small: SimpleNamespace) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu")
    want = llama.generate([[1, 5, 9]], 20, temperature=0)
    llama.model.double()
    assert llama.generate([[1, 5, 9]], 20, temperature=0) == want


def test_weights_that_change_between_calls_are_in_the_next_one_s_steps(small: SimpleNamespace) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu")
    before = llama.generate([[1, 5, 9]], 20, temperature=0)
    weights = {name: w * 1.5 if "w2" in name else w for name, w in llama.model.state_dict().items()}
    llama.model.load_state_dict(weights)
    other = Llama(llama.model, llama.tokenizer).generate([[1, 5, 9]], 20, temperature=0)
    assert llama.generate([[1, 5, 9]], 20, temperature=0) == other != before


def test_a_recorded_step_replays_at_other_positions(llama: Llama) -> None:
    """What a graph does: the step's operations, recorded once, run again on the same memory with other ids and positions.

    A number read on the host while recording would be replayed as it was, and give other logits.
    """
    model = llama.model
    model.allocate()
    model.hidden(torch.tensor([1, 5, 9, 1, 7, 1]), Batch.of([(0, 0, 3), (1, 0, 2), (2, 0, 1)]))
    step = Step(model, 3, 64)

    def record(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        step.ids.copy_(ids)
        step.positions.copy_(positions)
        step.run()
        assert step.logits is not None
        return step.logits

    with torch.no_grad():
        graph = make_fx(record)(torch.tensor([2, 2, 2]), torch.tensor([0, 0, 0]))
        assert not any(node.target is torch.ops.aten._local_scalar_dense.default for node in graph.graph.nodes)
        for ids, positions in (([8, 4, 3], [3, 2, 1]), ([9, 9, 7], [4, 3, 2])):
            args = torch.tensor(ids), torch.tensor(positions)
            want = model.logits(model.hidden(args[0], Batch.step(args[1], 5)))
            torch.testing.assert_close(graph(*args), want, atol=1e-4, rtol=0)


def test_a_new_cache_makes_new_steps(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step holds the addresses of the cache it was captured with."""
    monkeypatch.setattr(llama.engine.decoder, "static", True)
    want = llama.generate([[1, 5]], 8, temperature=0)
    (first,) = llama.engine.decoder.steps.values()
    assert llama.generate([[1, 5]], 8, temperature=0) == want and [*llama.engine.decoder.steps.values()] == [first]
    llama.model.allocate()
    assert llama.generate([[1, 5]], 8, temperature=0) == want and [*llama.engine.decoder.steps.values()] != [first]


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_what_is_loaded_later_is_in_the_next_calls_steps(small: SimpleNamespace, kind: str | None) -> None:
    """Quantized weights then lie elsewhere: a captured step would look at what is gone."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", dtype="bfloat16", quantize=kind)
    llama.engine.decoder.static = True
    before = llama.generate([[1, 5, 9]], 20, temperature=0)
    steps = llama.engine.decoder.steps
    assert llama.generate([[1, 5, 9]], 20, temperature=0) == before and llama.engine.decoder.steps is steps
    llama.model.load_state_dict({name: w * 1.5 if "w2" in name else w for name, w in llama.model.state_dict().items()})
    after = llama.generate([[1, 5, 9]], 20, temperature=0)
    assert after != before and (llama.engine.decoder.steps is steps) == (kind is None)

    def moved(change: Callable[[], object]) -> bool:
        llama.generate([[1, 5, 9]], 3, temperature=0)
        steps = llama.engine.decoder.steps
        change()
        llama.generate([[1, 5, 9]], 3, temperature=0)
        return llama.engine.decoder.steps is not steps

    model, norm = llama.model, llama.model.layers[1].ffn_norm
    assert not moved(lambda: None)
    assert moved(lambda: setattr(norm.weight, "data", norm.weight.data.clone()))
    assert moved(lambda: setattr(model.tok_embeddings, "weight", torch.nn.Parameter(model.tok_embeddings.weight.detach() * 2)))
    plain = torch.ones(64).bfloat16()
    assert moved(lambda: (delattr(norm, "weight"), setattr(norm, "weight", plain)))
    assert moved(lambda: setattr(norm, "eps", 1e-3))
    packed = [weakref.ref(m.packed) for m in model.modules() if isinstance(m, ParallelLinear) and m.packed]
    assert len(packed) == (9 if kind else 0)
    model.load_state_dict(model.state_dict())
    gc.collect()
    assert not any(kernel() for kernel in packed)  # what was there is not held by what was captured


def test_a_model_that_changes_under_a_stream_ends_it(small: SimpleNamespace) -> None:
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu")
    llama.engine.decoder.static = True
    stream = llama.tokens([[1, 5, 9]], 20, temperature=0)
    next(stream), next(stream)
    llama.model.bfloat16()
    with pytest.raises(InputError, match="another call"):
        list(stream)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_compiled_block_serves_all_layers(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str | None
) -> None:
    """Four graphs, without breaks, for every layer, position, bucket and call; another number of rows compiles anew. In 16
    bits what is compiled may round otherwise, and two ids that are nearly as likely part the answers."""
    monkeypatch.setattr(native, "COMPILED", None)  # what rounds the rows is not for compiling
    monkeypatch.setattr(avx2, "LIBRARY", None)
    llama = Llama.build(small.folder, small.tokenizer_path, 300, 4, device="cpu", dtype=dtype, quantize=kind)
    llama.engine.decoder.static = True
    want, values = llama.generate(PROMPTS, 150, temperature=0, logprobs=True)
    torch._dynamo.reset()
    graphs = []
    llama.model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    got, mine = llama.generate(PROMPTS, 150, temperature=0, logprobs=True)
    assert values and mine
    for ids, expected, row, wanted in zip(got, want, mine, values, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
        assert same == len(expected) or (dtype != "float32" and same > 30)
        assert row[:same] == pytest.approx(wanted[:same], abs=1e-4 if dtype == "float32" else 0.1)
    assert len(llama.engine.decoder.steps) == 2 and len(graphs) == 4
    llama.generate(PROMPTS[:1], 3, temperature=0)
    assert len(graphs) == 8


def test_any_number_of_shapes_is_compiled_and_a_failing_compiler_is_named(small: SimpleNamespace) -> None:
    """torch.compile by itself stops after eight."""
    torch._dynamo.reset()
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 12, device="cpu")
    llama.engine.decoder.static = True
    llama.model.compile(backend="eager")
    for rows in range(1, 13):
        llama.generate([[1, 5]] * rows, 2, temperature=0)

    def fails(graph: object, inputs: object) -> None:
        raise OSError("no compiler here")

    llama.model.compile(backend=fails)
    with pytest.raises(DeviceError, match=r"torch.compile failed; leave compile=True out \(.*no compiler here"):
        llama.generate([[1, 5]], 3, temperature=0)


def test_only_the_steps_last_used_are_kept(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_STEPS", 2)
    monkeypatch.setattr(llama.engine.decoder, "static", True)
    llama.engine.decoder.steps.clear()
    for rows in (1, 2, 1, 3):
        llama.generate([[1, 5]] * rows, 2, temperature=0)
    assert [rows for rows, _ in llama.engine.decoder.steps] == [1, 3]


def test_a_capture_that_fails_is_told_and_the_ids_are_the_same(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want = llama.generate(PROMPTS, 8, temperature=0)
    decoder = decode.Decoder(llama.model)
    monkeypatch.setattr(llama.engine, "decoder", decoder)
    step = Step(llama.model, 1, 64)
    monkeypatch.setattr(step, "capture", lambda stream, pool: (_ for _ in ()).throw(RuntimeError("not permitted\nmore")))
    decoder.stream = decoder.pool = object()  # type: ignore[assignment]
    decoder._capture(step)
    assert "no CUDA graphs, each step is launched kernel by kernel: not permitted\n" in capsys.readouterr().err
    assert decoder.captures is False and decoder.pool is None
    decoder.static = True
    assert llama.generate(PROMPTS, 8, temperature=0) == want


def test_a_model_that_changed_its_dtype_answers_at_once(small: SimpleNamespace) -> None:
    """Its cache is made anew, which is not another call's doing."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")
    llama.model.bfloat16()
    assert len(llama.generate([[1, 5]], 4, temperature=0)[0][0]) <= 4
    assert llama.model.cache is not None and llama.model.cache.data.dtype == torch.bfloat16


def test_compile_is_for_cuda(small: SimpleNamespace) -> None:
    with pytest.raises(DeviceError, match="compile=True is for CUDA, and this is cpu"):
        Llama.build(small.folder, small.tokenizer_path, device="cpu", compile=True)


def test_logits_of_a_caller_s_are_called_each_step(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.engine.decoder, "static", True)
    seen, logits = [], llama.model.logits
    monkeypatch.setattr(llama.model, "logits", lambda h: (seen.append(len(h)), logits(h))[1])
    llama.engine.decoder.steps.clear()
    for _ in range(2):
        llama.generate([[1, 5]], 4, temperature=0)
    assert not llama.engine.decoder.steps and len(seen) == 8


def test_a_hook_on_all_modules_sees_each_step(llama: Llama) -> None:
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    made = len(llama.generate([[1, 5]], 4, temperature=0)[0][0])
    handle.remove()
    assert made == 4 and seen.count("TransformerBlock") == 4 * len(llama.model.layers)


def test_a_compiled_module_is_not_passed_by() -> None:
    norm = RMSNorm(8)
    assert untouched([norm])
    norm.compile(backend="eager")
    assert not untouched([norm])


@pytest.mark.parametrize("change", ["nothing", "a weight held", "a norm's weight"])
def test_what_changes_under_a_stream_makes_new_steps(llama: Llama, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    decoder, model = llama.engine.decoder, llama.model
    monkeypatch.setattr(decoder, "static", True)
    monkeypatch.setitem(model.norm._parameters, "weight", model.norm.weight)  # put back afterwards
    stream = llama.tokens([[1, 5]], 8, 0)
    next(stream), next(stream)
    old = list(decoder.steps.values())
    if change == "a weight held":
        wo = model.layers[0].attention.wo
        wo.hold(wo.dense().clone())
    elif change == "a norm's weight":
        model.norm.weight = torch.nn.Parameter(model.norm.weight.detach().clone())
    next(stream)
    stream.close()
    assert old and any(step in old for step in decoder.steps.values()) == (change == "nothing")
    decoder.steps.clear()


def test_new_angles_make_new_steps(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.engine.decoder, "static", True)
    llama.generate([[1, 5]], 3, temperature=0)
    old = list(llama.engine.decoder.steps.values())
    llama.model.rope = None
    llama.generate([[1, 5]], 3, temperature=0)
    assert old and not any(step in old for step in llama.engine.decoder.steps.values())
    llama.engine.decoder.steps.clear()
