"""Test decode steps that are captured or compiled once, on the CPU: tokens are the same, and a changed model drops them."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from llama import DeviceError, InputError, Llama, Transformer, tuning
from llama.backends.cuda_graphs import CapturedStep, CudaGraphsBackend, context_bucket
from llama.backends.layerwise import TorchBackend
from llama.backends.torch_compile import TorchCompileBackend
from llama.engine.backend import Backend
from llama.engine.forward import EngineForward
from llama.engine.kv_cache import KVCache, RaggedBatch
from llama.engine.unmodified import why_modified
from llama.kernels import avx2, avx512
from llama.kernels.packed_weight import PackedWeight

from .support import no_extension

PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, 80, 81]]


def test_context_buckets_double_up_to_the_context_length() -> None:
    buckets = {1: 128, 128: 128, 129: 256, 256: 256, 257: 512, 512: 512, 513: 1000, 1000: 1000}
    assert {end: context_bucket(end, 1000) for end in buckets} == buckets
    assert context_bucket(3, 64) == 64


@pytest.fixture
def static(small: SimpleNamespace) -> Llama:
    built = Llama.build(small.folder, small.tokenizer_path, 64, 6, device="cpu")
    return Llama(built.model, built.tokenizer, CudaGraphsBackend())


def steps_of(llama: Llama) -> dict[tuple[int, int, int], CapturedStep]:
    assert isinstance(llama.engine.backend, CudaGraphsBackend)
    return llama.engine.backend.steps


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[1, 5], [1, 9]]])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_decoding_as_on_cuda_gives_the_same_tokens(
    llama: Llama, request: pytest.FixtureRequest, prompts: list[list[int]], temperature: float
) -> None:
    """Decode on the CPU as on CUDA: in static memory, starting each decode step before the host reads the previous tokens."""

    def answer() -> tuple:
        torch.manual_seed(5)
        return llama.generate(prompts, 58, temperature=temperature, logprobs=True)

    want = answer()
    request.getfixturevalue("as_on_cuda")
    got = answer()
    assert got[0] == want[0]
    for row, expected in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert steps_of(llama).keys() == {(len(prompts), 1, 64)}


def test_a_recorded_step_replays_with_other_tokens_and_positions(llama: Llama) -> None:
    """Record the operations of a decode step once, as a CUDA graph does, and replay them with other tokens and positions.

    A value that the host reads while recording would become a constant, and the replayed logits would be wrong.
    """
    forward = EngineForward(llama.model, KVCache.adopt(llama.model))
    forward.hidden_states(torch.tensor([1, 5, 9, 1, 7, 1]), RaggedBatch.from_segments([(0, 0, 3), (1, 0, 2), (2, 0, 1)]))
    step = CapturedStep(forward, CudaGraphsBackend().compute_logits, 3, 64)

    def record(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        step.tokens.copy_(tokens)
        step.positions.copy_(positions)
        step.run()
        assert step.logits is not None
        return step.logits

    with torch.no_grad():
        graph = make_fx(record)(torch.tensor([2, 2, 2]), torch.tensor([0, 0, 0]))
        assert not any(node.target is torch.ops.aten._local_scalar_dense.default for node in graph.graph.nodes)
        for tokens, positions in (([8, 4, 3], [3, 2, 1]), ([9, 9, 7], [4, 3, 2])):
            args = torch.tensor(tokens), torch.tensor(positions)
            want = forward.logits(forward.hidden_states(args[0], RaggedBatch.decode(args[1], 5)))
            torch.testing.assert_close(graph(*args), want, atol=1e-4, rtol=0)


def test_a_replaced_cache_tensor_drops_the_captured_steps(static: Llama) -> None:
    """A captured step contains the addresses of the cache that it was captured with."""
    want = static.generate([[1, 5]], 8, temperature=0)
    (first,) = steps_of(static).values()
    assert static.generate([[1, 5]], 8, temperature=0) == want and [*steps_of(static).values()] == [first]
    for layer in static.model.layers:
        layer.attention.cache_k = layer.attention.cache_k.clone()
    assert static.generate([[1, 5]], 8, temperature=0) == want and [*steps_of(static).values()] != [first]


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_replaced_weights_are_used_by_the_next_call_and_drop_the_captured_steps(
    small: SimpleNamespace, format: str | None
) -> None:
    """Loading quantized weights allocates new memory: an old captured step would read freed memory."""
    built = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", dtype="bfloat16", quantize=format)
    llama = Llama(built.model, built.tokenizer, CudaGraphsBackend())
    before = llama.generate([[1, 5, 9]], 20, temperature=0)
    steps = steps_of(llama)
    assert llama.generate([[1, 5, 9]], 20, temperature=0) == before and steps_of(llama) is steps
    llama.model.load_state_dict({name: w * 1.5 if "w2" in name else w for name, w in llama.model.state_dict().items()})
    after = llama.generate([[1, 5, 9]], 20, temperature=0)
    assert after != before and (steps_of(llama) is steps) == (format is None)

    def drops_steps(change: Callable[[], object]) -> bool:
        llama.generate([[1, 5, 9]], 3, temperature=0)
        steps = steps_of(llama)
        change()
        llama.generate([[1, 5, 9]], 3, temperature=0)
        return steps_of(llama) is not steps

    model, norm = llama.model, llama.model.layers[1].ffn_norm
    assert not drops_steps(lambda: None)
    assert drops_steps(lambda: setattr(norm.weight, "data", norm.weight.data.clone()))
    assert drops_steps(
        lambda: setattr(model.tok_embeddings, "weight", torch.nn.Parameter(model.tok_embeddings.weight.detach() * 2))
    )
    assert drops_steps(lambda: setattr(norm, "eps", 1e-3))
    assert drops_steps(lambda: setattr(model, "freqs_cis", model.freqs_cis * 1))
    kernels = [weakref.ref(w.shared.kernel) for w in model.parameters() if isinstance(w, PackedWeight)]
    assert len(kernels) == (15 if format else 0)
    model.load_state_dict({name: w.float().to(w.dtype) for name, w in model.state_dict().items()})
    llama.generate([[1, 5, 9]], 3, temperature=0)
    gc.collect()
    assert not any(kernel() for kernel in kernels)  # captured steps must not keep the replaced weights alive


CHANGES: dict[str, Callable[[Transformer], object]] = {
    "a packed weight": lambda model: model.layers[0].attention.wo.weight.mul_(2),
    "a norm's weight": lambda model: model.norm.weight.mul_(2),
    "another weight": lambda model: setattr(model.norm, "weight", torch.nn.Parameter(torch.ones(64), requires_grad=False)),
    "frequencies": lambda model: setattr(model, "freqs_cis", model.freqs_cis.conj()),
    "a cache": lambda model: setattr(model.layers[0].attention, "cache_k", model.layers[0].attention.cache_k.clone()),
    "a hook": lambda model: model.layers[1].register_forward_hook(lambda module, args, y: y * 0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make_backend", [TorchBackend, CudaGraphsBackend], ids=lambda backend: backend.name)
def test_a_model_that_changes_while_a_stream_is_open_raises_in_the_stream(
    small: SimpleNamespace, make_backend: Callable[[], Backend], change: str
) -> None:
    built = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", quantize="int8")
    llama = Llama(built.model, built.tokenizer, make_backend())
    stream = llama.generate_stream([[1, 5]], 8, 0)
    next(stream), next(stream)
    CHANGES[change](llama.model)
    with pytest.raises(InputError, match=r"this generate_stream ended .* the model has been changed since"):
        list(stream)


def test_the_least_recently_used_captured_steps_are_dropped(static: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MAX_CAPTURED_STEPS", 2)
    for rows in (1, 2, 1, 3):
        static.generate([[1, 5]] * rows, 2, temperature=0)
    assert [rows for rows, *_ in steps_of(static)] == [1, 3]


def test_a_capture_that_fails_is_reported_and_the_tokens_are_the_same(
    static: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want, backend = static.generate(PROMPTS, 8, temperature=0), static.engine.backend
    assert isinstance(backend, CudaGraphsBackend)
    step = CapturedStep(static.engine.forward(), CudaGraphsBackend().compute_logits, 1, 64)
    monkeypatch.setattr(step, "capture", lambda stream, pool: (_ for _ in ()).throw(RuntimeError("not permitted\nmore")))
    backend.stream = backend.pool = object()  # type: ignore[assignment]
    backend.capture(step)
    assert "no CUDA graphs, each step is launched kernel by kernel: not permitted\n" in capsys.readouterr().err
    assert backend.captures is False and backend.pool is None
    assert static.generate(PROMPTS, 8, temperature=0) == want


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_compiled_graphs_are_used_for_all_layers_positions_and_calls(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: str, format: str | None
) -> None:
    """Compile once per number of rows, without graph breaks.

    Compiled 16-bit code rounds differently. If two tokens are nearly equally probable, the compiled model may choose the
    other token. From there on the answers differ.
    """
    monkeypatch.setattr(avx512, "status", no_extension)  # torch.compile does not use the extension, which rounds activations
    monkeypatch.setattr(avx2, "status", no_extension)
    built = Llama.build(small.folder, small.tokenizer_path, 300, 4, device="cpu", dtype=dtype, quantize=format)
    want, want_logprobs = Llama(built.model, built.tokenizer, CudaGraphsBackend()).generate(
        PROMPTS, 150, temperature=0, logprobs=True
    )
    torch._dynamo.reset()
    graphs: list[object] = []
    llama = Llama(
        built.model, built.tokenizer, TorchCompileBackend(backend=lambda graph, inputs: graphs.append(graph) or graph)
    )
    got, got_logprobs = llama.generate(PROMPTS, 150, temperature=0, logprobs=True)
    assert want_logprobs and got_logprobs
    for tokens, expected, logprobs, expected_logprobs in zip(got, want, got_logprobs, want_logprobs, strict=True):
        n_equal = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), len(expected))
        assert n_equal == len(expected) or (dtype != "float32" and n_equal > 15)
        assert logprobs[:n_equal] == pytest.approx(expected_logprobs[:n_equal], abs=1e-4 if dtype == "float32" else 0.1)
    assert len(steps_of(llama)) == 2 and len(graphs) == 4
    llama.generate(PROMPTS[:1], 3, temperature=0)
    assert len(graphs) == 8


def test_any_number_of_batch_sizes_is_compiled_and_a_failing_compiler_raises_its_reason(small: SimpleNamespace) -> None:
    """By default torch.compile stops compiling a function after eight shapes."""
    torch._dynamo.reset()
    built = Llama.build(small.folder, small.tokenizer_path, 64, 12, device="cpu")
    llama = Llama(built.model, built.tokenizer, TorchCompileBackend(backend="eager"))
    for rows in range(1, 13):
        llama.generate([[1, 5]] * rows, 2, temperature=0)

    def fails(graph: object, inputs: object) -> None:
        raise OSError("no compiler here")

    failing = Llama(built.model, built.tokenizer, TorchCompileBackend(backend=fails))
    with pytest.raises(DeviceError, match=r"torch.compile failed; leave compile=True out, or use .*\(.*no compiler here"):
        failing.generate([[1, 5]], 3, temperature=0)


def test_a_model_with_a_hook_is_not_captured(static: Llama) -> None:
    """A CUDA graph runs no Python, so a hook would be called only during the capture."""
    want = static.generate([[1, 5, 9]], 6, temperature=0)
    assert steps_of(static) and why_modified(static.model) is None
    steps_of(static).clear()
    shapes: list[list[int]] = []
    handle = static.model.layers[1].attention.register_forward_hook(lambda module, args, y: shapes.append(list(y.shape)))
    assert static.generate([[1, 5, 9]], 6, temperature=0) == want
    handle.remove()
    assert shapes == [[1, 3, 64], *[[1, 1, 64]] * 5] and not steps_of(static)
    assert static.generate([[1, 5, 9]], 6, temperature=0) == want and steps_of(static)


def test_a_model_converted_to_another_dtype_generates_with_a_cache_of_that_dtype(small: SimpleNamespace) -> None:
    """`generate` allocates a new cache. It must not raise the error for a cache that another call has taken over."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")
    for dtype in (torch.bfloat16, torch.float64):
        model: Transformer = llama.model.to(dtype)
        assert len(llama.generate([[1, 5]], 4, temperature=0)[0][0]) <= 4
        assert model.layers[0].attention.cache_k.dtype == dtype
