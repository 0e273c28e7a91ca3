"""The decode step as it is captured, seen without a GPU: static memory, any positions, the same ids as the plain step."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from llama import Llama, runtime
from llama.cache import Batch
from llama.decode import Step, bucket
from llama.errors import DeviceError

PROMPTS = [[1, 5, 9, 30, 8], [1, 7], [1, 80, 81]]


def test_buckets_double_and_end_with_the_window() -> None:
    assert [bucket(end, 1000) for end in (1, 128, 129, 256, 257, 512, 513, 1000)] == [128, 128, 256, 256, 512, 512, 1000, 1000]
    assert bucket(3, 64) == 64


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[1, 5], [1, 9]]])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_static_steps_and_late_reading_give_the_same_ids(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], temperature: float
) -> None:
    """As on CUDA: steps over a bucket with a mask, and each launched before the ids of the one before are read."""

    def answer() -> tuple:
        torch.manual_seed(5)
        return llama.generate(prompts, 58, temperature=temperature, logprobs=True)

    want = answer()
    monkeypatch.setattr(llama.decoder, "static", True)
    monkeypatch.setattr(runtime, "runs_ahead", lambda device: True)
    got = answer()
    assert got[0] == want[0]
    for row, expected in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
    assert (len(prompts), 64) in llama.decoder.steps


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
            want = model.logits(model.hidden(args[0], Batch.step(torch.arange(3), args[1], 5)))
            torch.testing.assert_close(graph(*args), want, atol=1e-4, rtol=0)


def test_a_new_cache_makes_new_steps(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step holds the addresses of the cache it was captured with."""
    monkeypatch.setattr(llama.decoder, "static", True)
    want = llama.generate([[1, 5]], 8, temperature=0)
    (first,) = llama.decoder.steps.values()
    assert llama.generate([[1, 5]], 8, temperature=0) == want and [*llama.decoder.steps.values()] == [first]
    llama.model.allocate()
    assert llama.generate([[1, 5]], 8, temperature=0) == want and [*llama.decoder.steps.values()] != [first]


def test_a_compiled_block_serves_all_layers(small: SimpleNamespace) -> None:
    """One graph, without breaks, for every layer, position and call; another bucket or number of rows compiles anew."""
    llama = Llama.build(small.folder, small.tokenizer_path, 200, 4, device="cpu")
    want = llama.generate(PROMPTS, 20, temperature=0)
    torch._dynamo.reset()
    graphs = []
    llama.decoder.static = True
    llama.model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert llama.generate(PROMPTS, 20, temperature=0) == want
    assert len(graphs) == 1
    llama.generate(PROMPTS[:1], 3, temperature=0)
    assert len(graphs) == 2


def test_compile_is_for_cuda(small: SimpleNamespace) -> None:
    with pytest.raises(DeviceError, match="compile=True is for CUDA, and this is cpu"):
        Llama.build(small.folder, small.tokenizer_path, device="cpu", compile=True)
