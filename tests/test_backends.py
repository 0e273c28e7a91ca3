"""Every backend gives what the reference model gives: the contract. And which backend is chosen, and what it says.

What runs on a GPU is seen here by its twin on the CPU: the same steps in static memory, not captured.
"""

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from llama import DeviceError, InputError, Llama, Transformer, info, tuning
from llama.backends import cpu, registry
from llama.backends.cpu import CpuBackend
from llama.backends.cuda_graphs import CapturedStep, CudaGraphsBackend, context_bucket
from llama.backends.layerwise import TorchBackend
from llama.backends.torch_compile import TorchCompileBackend
from llama.engine.backend import Backend
from llama.engine.forward import EngineForward
from llama.engine.kv_cache import KVCache, RaggedBatch
from llama.engine.unmodified import why_modified
from llama.kernels import avx2, avx512, pack
from llama.kernels.packed_weight import PackedWeight

from .support import TORCHRUN, no_extension, random_weights, run, write_shards

PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, 80, 81]]
WINDOW = 40
PARAMS = dict(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=64, norm_eps=1e-5, vocab_size=-1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> SimpleNamespace:
    """Wide enough for all compiled code: heads of 64."""
    folder = write_shards(tmp_path_factory.mktemp("wide"), PARAMS, random_weights(PARAMS, 384, 704), 2)
    return SimpleNamespace(folder=folder, tokenizer_path=tokenizer_path)


@pytest.fixture(params=["with compiled code", "without"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)  # these weights, too, are packed
    if request.param == "without":
        for module, name in ((avx512, "status"), (avx2, "status"), (pack, "status")):
            monkeypatch.setattr(module, name, no_extension)
    yield request.param != "without"


def build(wide: SimpleNamespace, **options: object) -> Llama:
    return Llama.build(wide.folder, wide.tokenizer_path, WINDOW, 4, device="cpu", **options)  # type: ignore[arg-type]


def served_by(wide: SimpleNamespace, make: Callable[[], Backend], **options: object) -> Llama:
    built = build(wide, **options)
    return Llama(built.model, built.tokenizer, make())


@pytest.mark.parametrize("make", [TorchBackend, CpuBackend, CudaGraphsBackend], ids=lambda make: make.name)
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_backend_gives_the_logits_of_the_reference(
    wide: SimpleNamespace, compiled: bool, dtype: str, kind: str | None, make: Callable[[], Backend]
) -> None:
    """Of packed prompts, of ragged steps, and of the last position of the window; quantized weights against plain ones of the
    same values."""
    reference = build(wide, dtype=dtype, quantize=kind, backend="eager").model
    llama = served_by(wide, make, dtype=dtype, quantize=kind)
    tolerance = 1e-3 if dtype == "float32" and kind is None else 0.02 if dtype == "float32" else 0.12
    tokens = torch.randint(3, 384, (4, WINDOW), generator=torch.Generator().manual_seed(2))
    want = reference.forward(tokens, 0)
    starts = [5, 1, 12, WINDOW - 1]
    forward = llama.engine.forward()
    with torch.inference_mode():
        packed = torch.cat([row[:n] for row, n in zip(tokens, starts, strict=True)])
        hidden = forward.hidden_states(packed, RaggedBatch.from_segments((row, 0, n) for row, n in enumerate(starts)))
        expected = torch.cat([row[:n] for row, n in zip(want, starts, strict=True)])
        torch.testing.assert_close(forward.logits(hidden), expected, atol=tolerance, rtol=0)
        take, at = llama.engine.backend.begin(forward, 4), list(starts)
        for _ in range(3):
            step = take(tokens[range(4), at], torch.tensor(at), at)
            torch.testing.assert_close(step, want[range(4), at], atol=tolerance, rtol=0)
            at = [min(position + 1, WINDOW - 1) for position in at]


@pytest.mark.parametrize("make", [TorchBackend, CpuBackend, CudaGraphsBackend], ids=lambda make: make.name)
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_every_backend_answers_as_the_reference(
    wide: SimpleNamespace, compiled: bool, kind: str | None, make: Callable[[], Backend]
) -> None:
    """Tokens and log probabilities, of more prompts than rows, to the end of the window."""
    want, values = build(wide, quantize=kind, backend="eager").generate(
        PROMPTS * 2, 60, temperature=0, logprobs=True, echo=True
    )
    got, found = served_by(wide, make, quantize=kind).generate(PROMPTS * 2, 60, temperature=0, logprobs=True, echo=True)
    assert values and found
    for row, expected, value, wanted in zip(got, want, found, values, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(row, expected, strict=True)) if a != b), len(expected))
        assert same == len(expected) or (kind and same > 6)  # activations of 8 and 16 bits may part two tokens that nearly tie
        assert value[:same] == pytest.approx(wanted[:same], abs=0.05 if kind else 1e-3)


def test_two_ranks_answer_as_one(wide: SimpleNamespace, tmp_path: Path) -> None:
    script = tmp_path / "answer.py"
    script.write_text(
        "import json, sys\nfrom llama import Llama\nimport torch.distributed as dist\nfor kind in (None, 'int8', 'int4'):\n"
        "    for backend in ('auto', 'eager'):\n"
        f"        llama = Llama.build(*sys.argv[1:], {WINDOW}, 4, device='cpu', backend=backend, quantize=kind)\n"
        f"        tokens, values = llama.generate({PROMPTS}, 12, temperature=0, logprobs=True)\n"
        "        if dist.get_rank() == 0: print(json.dumps([kind, llama.backend, tokens, values]))\n"
    )
    done, seen = run(*TORCHRUN, 2, script, wide.folder, wide.tokenizer_path), []
    for line in done.stdout.splitlines():
        kind, name, tokens, values = json.loads(line)
        seen.append((kind, name))
        alone = build(wide, quantize=kind, backend="eager").generate(PROMPTS, 12, temperature=0, logprobs=True)
        for row, expected, value, wanted in zip(tokens, alone[0], values, alone[1] or [], strict=True):
            same = next((i for i, (a, b) in enumerate(zip(row, expected, strict=True)) if a != b), len(expected))
            assert same == len(expected) or (kind and same > 3)
            assert value[:same] == pytest.approx(wanted[:same], abs=0.05 if kind else 1e-3)
    default = build(wide).backend
    assert seen == [(kind, name) for kind in (None, "int8", "int4") for name in (default, "eager")], done.stderr


def test_a_cpu_without_the_instructions_is_told_so(wide: SimpleNamespace) -> None:
    """By the environment. It answers the same, says on stderr that it is slower, and `info` says why."""
    code = (
        f"from llama import Llama; paths = {str(wide.folder)!r}, {str(wide.tokenizer_path)!r}; "
        f"l = Llama.build(*paths, {WINDOW}, 4, device='cpu'); print(l.backend, l.generate({PROMPTS}, 6, temperature=0)[0])"
    )
    done = run("-c", code, LLAMA_COMPILED="0")
    assert done.stdout == f"torch {build(wide, backend='eager').generate(PROMPTS, 6, temperature=0)[0]}\n"
    assert done.stderr.count("\n") == 1 and "slower than it could be, without compiled kernels: switched off" in done.stderr
    told = run("-m", "llama", "info", "--ckpt_dir", wide.folder, "--device", "cpu", LLAMA_COMPILED="0").stdout
    assert "backend: cpu            not available: switched off by LLAMA_COMPILED=0" in told


@pytest.mark.skipif(avx2.extension() is None, reason="nothing is compiled here")
@pytest.mark.parametrize("module", [avx512, avx2, pack], ids=lambda module: module.__name__)
def test_a_part_of_the_compiled_code_that_is_missing_is_told(
    wide: SimpleNamespace, module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only all of it."""
    monkeypatch.setattr(module, "status", no_extension)
    assert build(wide).backend == "cpu"
    assert capsys.readouterr().err == (
        f"llama: decoding is slower than it could be, without compiled kernels: {no_extension().reason}\n"
    )


def test_backends_by_name(wide: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("torch", "eager"):
        assert build(wide, backend=name).backend == name
    for bad in ("fast", 3, None, ["cpu"]):
        with pytest.raises(
            InputError, match=r"backend is .*use 'auto' or one of 'torch_compile', 'cuda_graphs', 'cpu', 'torch'"
        ):
            build(wide, backend=bad)
    with pytest.raises(DeviceError, match="backend='cuda_graphs': it is for CUDA, and the device is cpu; use backend='auto'"):
        build(wide, backend="cuda_graphs")
    with pytest.raises(DeviceError, match="compile=True is for CUDA, and this is cpu"):
        build(wide, compile=True)
    assert capsys.readouterr().err == ""
    told = info(wide.folder, "cpu")
    assert all(f"backend: {name}" in told for name in registry.BACKENDS) and "dim 256, 2 layers" in told


@pytest.mark.skipif(avx512.extension() is None, reason="native.c is not compiled, or this CPU is no such CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_odd_width_is_told(
    dtype: torch.dtype, tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It costs speed: a decode step then goes layer by layer."""
    params = PARAMS | {"multiple_of": 48}  # a feed-forward of 720
    weights = {name: w.to(dtype) for name, w in random_weights(params, 384, 720).items()}
    folder = write_shards(tmp_path / "odd", params, weights)
    built = Llama.build(folder, tokenizer_path, WINDOW, 2, device="cpu")
    told = "layer by layer: the compiled decode step needs a feed-forward width that is a multiple of 64, and this one is 720"
    assert told in capsys.readouterr().err
    assert "a multiple of 64, and this one is 720" in info(folder, "cpu")
    reference = Llama.build(folder, tokenizer_path, WINDOW, 2, device="cpu", backend="eager")
    assert built.generate([[1, 5, 9]], 8, temperature=0) == reference.generate([[1, 5, 9]], 8, temperature=0)


@pytest.mark.skipif(avx512.extension() is None, reason="_avx512 is not compiled, or this CPU lacks its instructions")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_info_tells_which_models_decode_in_one_call(
    dtype: str, wide: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MIN_PACKED_BYTES", 0)
    weights = {name: w.to(getattr(torch, dtype)) for name, w in random_weights(PARAMS, 384, 704).items()}
    told = info(write_shards(tmp_path / dtype, PARAMS, weights), "cpu")
    forward = build(wide, dtype=dtype).engine.forward()
    why = "the compiled decode step needs bfloat16 or float32, and the model is in float16" if dtype == "float16" else None
    assert cpu.why_unsupported(forward) == why
    assert (f"layer by layer: {why}" if why else "one call of compiled code for all layers") in told


# --- static steps, as they are captured ---


def test_buckets_double_and_end_with_the_window() -> None:
    assert [context_bucket(end, 1000) for end in (1, 128, 129, 256, 257, 512, 513, 1000)] == [
        128,
        128,
        256,
        256,
        512,
        512,
        1000,
        1000,
    ]
    assert context_bucket(3, 64) == 64


@pytest.fixture
def static(small: SimpleNamespace) -> Llama:
    built = Llama.build(small.folder, small.tokenizer_path, 64, 6, device="cpu")
    return Llama(built.model, built.tokenizer, CudaGraphsBackend())


def steps_of(llama: Llama) -> dict[tuple[int, int], CapturedStep]:
    assert isinstance(llama.engine.backend, CudaGraphsBackend)
    return llama.engine.backend.steps


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[1, 5], [1, 9]]])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_static_steps_and_late_reading_give_the_same_tokens(
    llama: Llama, request: pytest.FixtureRequest, prompts: list[list[int]], temperature: float
) -> None:
    """As on CUDA: steps over a bucket with a mask, and each launched before the tokens of the one before are read."""

    def answer() -> tuple:
        torch.manual_seed(5)
        return llama.generate(prompts, 58, temperature=temperature, logprobs=True)

    want = answer()
    request.getfixturevalue("as_on_cuda")
    got = answer()
    assert got[0] == want[0]
    for row, expected in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert steps_of(llama).keys() == {(len(prompts), 64)}


def test_a_recorded_step_replays_at_other_positions(llama: Llama) -> None:
    """What a graph does: the step's operations, recorded once, run again on the same memory with other tokens and positions.

    A number read on the host while recording would be replayed as it was, and give other logits.
    """
    forward = EngineForward(llama.model, KVCache.adopt(llama.model))
    forward.hidden_states(torch.tensor([1, 5, 9, 1, 7, 1]), RaggedBatch.from_segments([(0, 0, 3), (1, 0, 2), (2, 0, 1)]))
    step = CapturedStep(forward, None, 3, 64)

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


def test_a_new_cache_makes_new_steps(static: Llama) -> None:
    """A captured step holds the addresses of the cache it was captured with."""
    want = static.generate([[1, 5]], 8, temperature=0)
    (first,) = steps_of(static).values()
    assert static.generate([[1, 5]], 8, temperature=0) == want and [*steps_of(static).values()] == [first]
    for layer in static.model.layers:
        layer.attention.cache_k = layer.attention.cache_k.clone()
    assert static.generate([[1, 5]], 8, temperature=0) == want and [*steps_of(static).values()] != [first]


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_what_is_loaded_later_is_in_the_next_calls_steps(small: SimpleNamespace, kind: str | None) -> None:
    """Quantized weights then lie elsewhere: a captured step would look at what is gone."""
    built = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", dtype="bfloat16", quantize=kind)
    llama = Llama(built.model, built.tokenizer, CudaGraphsBackend())
    before = llama.generate([[1, 5, 9]], 20, temperature=0)
    steps = steps_of(llama)
    assert llama.generate([[1, 5, 9]], 20, temperature=0) == before and steps_of(llama) is steps
    llama.model.load_state_dict({name: w * 1.5 if "w2" in name else w for name, w in llama.model.state_dict().items()})
    after = llama.generate([[1, 5, 9]], 20, temperature=0)
    assert after != before and (steps_of(llama) is steps) == (kind is None)

    def moved(change: Callable[[], object]) -> bool:
        llama.generate([[1, 5, 9]], 3, temperature=0)
        steps = steps_of(llama)
        change()
        llama.generate([[1, 5, 9]], 3, temperature=0)
        return steps_of(llama) is not steps

    model, norm = llama.model, llama.model.layers[1].ffn_norm
    assert not moved(lambda: None)
    assert moved(lambda: setattr(norm.weight, "data", norm.weight.data.clone()))
    assert moved(lambda: setattr(model.tok_embeddings, "weight", torch.nn.Parameter(model.tok_embeddings.weight.detach() * 2)))
    assert moved(lambda: setattr(norm, "eps", 1e-3))
    assert moved(lambda: setattr(model, "freqs_cis", model.freqs_cis * 1))
    packed = [weakref.ref(w.shared.kernel) for w in model.parameters() if isinstance(w, PackedWeight)]
    assert len(packed) == (15 if kind else 0)
    model.load_state_dict({name: w.float().to(w.dtype) for name, w in model.state_dict().items()})
    llama.generate([[1, 5, 9]], 3, temperature=0)
    gc.collect()
    assert not any(kernel() for kernel in packed)  # what was there is not held by what was captured


CHANGES: dict[str, Callable[[Transformer], object]] = {
    "a packed weight": lambda model: model.layers[0].attention.wo.weight.mul_(2),
    "a norm's weight": lambda model: model.norm.weight.mul_(2),
    "another weight": lambda model: setattr(model.norm, "weight", torch.nn.Parameter(torch.ones(64), requires_grad=False)),
    "frequencies": lambda model: setattr(model, "freqs_cis", model.freqs_cis.conj()),
    "a cache": lambda model: setattr(model.layers[0].attention, "cache_k", model.layers[0].attention.cache_k.clone()),
    "a hook": lambda model: model.layers[1].register_forward_hook(lambda module, args, y: y * 0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [TorchBackend, CudaGraphsBackend], ids=lambda make: make.name)
def test_a_model_that_changes_under_a_stream_ends_it(small: SimpleNamespace, make: Callable[[], Backend], change: str) -> None:
    built = Llama.build(small.folder, small.tokenizer_path, 64, 2, device="cpu", quantize="int8")
    llama = Llama(built.model, built.tokenizer, make())
    stream = llama.generate_stream([[1, 5]], 8, 0)
    next(stream), next(stream)
    CHANGES[change](llama.model)
    with pytest.raises(InputError, match="changed under a stream or a loop over tokens: begin it anew"):
        list(stream)


def test_only_the_steps_last_used_are_kept(static: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MAX_CAPTURED_STEPS", 2)
    for rows in (1, 2, 1, 3):
        static.generate([[1, 5]] * rows, 2, temperature=0)
    assert [rows for rows, _ in steps_of(static)] == [1, 3]


def test_a_capture_that_fails_is_told_and_the_tokens_are_the_same(
    static: Llama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want, backend = static.generate(PROMPTS, 8, temperature=0), static.engine.backend
    assert isinstance(backend, CudaGraphsBackend)
    step = CapturedStep(static.engine.forward(), None, 1, 64)
    monkeypatch.setattr(step, "capture", lambda stream, pool: (_ for _ in ()).throw(RuntimeError("not permitted\nmore")))
    backend.stream = backend.pool = object()  # type: ignore[assignment]
    backend._capture(step)
    assert "no CUDA graphs, each step is launched kernel by kernel: not permitted\n" in capsys.readouterr().err
    assert backend.captures is False and backend.pool is None
    assert static.generate(PROMPTS, 8, temperature=0) == want


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_compiled_layer_serves_all_layers(
    small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str | None
) -> None:
    """Four graphs, without breaks, for every layer, position, bucket and call; another number of rows compiles anew. In 16
    bits what is compiled may round otherwise, and two tokens that are nearly as likely part the answers."""
    monkeypatch.setattr(avx512, "status", no_extension)  # what rounds the rows is not for compiling
    monkeypatch.setattr(avx2, "status", no_extension)
    built = Llama.build(small.folder, small.tokenizer_path, 300, 4, device="cpu", dtype=dtype, quantize=kind)
    want, values = Llama(built.model, built.tokenizer, CudaGraphsBackend()).generate(PROMPTS, 150, temperature=0, logprobs=True)
    torch._dynamo.reset()
    graphs: list[object] = []
    llama = Llama(
        built.model, built.tokenizer, TorchCompileBackend(backend=lambda graph, inputs: graphs.append(graph) or graph)
    )
    got, mine = llama.generate(PROMPTS, 150, temperature=0, logprobs=True)
    assert values and mine
    for tokens, expected, row, wanted in zip(got, want, mine, values, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), len(expected))
        assert same == len(expected) or (dtype != "float32" and same > 30)
        assert row[:same] == pytest.approx(wanted[:same], abs=1e-4 if dtype == "float32" else 0.1)
    assert len(steps_of(llama)) == 2 and len(graphs) == 4
    llama.generate(PROMPTS[:1], 3, temperature=0)
    assert len(graphs) == 8


def test_any_number_of_shapes_is_compiled_and_a_failing_compiler_is_named(small: SimpleNamespace) -> None:
    """torch.compile by itself stops after eight."""
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


def test_a_changed_model_is_not_captured(static: Llama) -> None:
    """A graph calls no Python: a hook would see one step of each size."""
    want = static.generate([[1, 5, 9]], 6, temperature=0)
    assert steps_of(static) and why_modified(static.model) is None
    steps_of(static).clear()
    seen: list[list[int]] = []
    handle = static.model.layers[1].attention.register_forward_hook(lambda module, args, y: seen.append(list(y.shape)))
    assert static.generate([[1, 5, 9]], 6, temperature=0) == want
    handle.remove()
    assert seen == [[1, 3, 64], *[[1, 1, 64]] * 5] and not steps_of(static)
    assert static.generate([[1, 5, 9]], 6, temperature=0) == want and steps_of(static)


def test_a_model_that_changed_its_dtype_answers_at_once(small: SimpleNamespace) -> None:
    """Its cache is made anew, which is not another call's doing."""
    llama = Llama.build(small.folder, small.tokenizer_path, 64, 4, device="cpu")
    for dtype in (torch.bfloat16, torch.float64):
        model: Transformer = llama.model.to(dtype)
        assert len(llama.generate([[1, 5]], 4, temperature=0)[0][0]) <= 4
        assert model.layers[0].attention.cache_k.dtype == dtype
