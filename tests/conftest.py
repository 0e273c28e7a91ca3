from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama, Tokenizer, Transformer
from llama.backends.cuda_graphs import CapturedStep, CudaGraphsBackend
from llama.engine import async_copy

from .fault_server import FILES, SHARD, Downloader, FaultServer, files_of
from .support import ROOT, random_weights, train_tokenizer, write_shards

# Tests are of small tensors, for which threads take longer to meet than to compute: on a busy machine 200 times as long.
torch.set_num_threads(1)

SMALL = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
SMALL_HIDDEN, VOCAB = 192, 384


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever GPUs there are: test_cuda.py alone is about them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_cuda":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", VOCAB)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> SimpleNamespace:
    """A small random model in one shard: folder, tokenizer_path, params and whole weights."""
    weights = random_weights(SMALL, VOCAB, SMALL_HIDDEN)
    folder = write_shards(tmp_path_factory.mktemp("small"), SMALL, weights)
    return SimpleNamespace(folder=folder, tokenizer_path=tokenizer_path, params=SMALL, weights=weights)


@pytest.fixture(scope="session")
def shared_llama(small: SimpleNamespace) -> Llama:
    return Llama.build(small.folder, small.tokenizer_path, max_seq_len=64, max_batch_size=6, device="cpu")


@pytest.fixture
def llama(shared_llama: Llama) -> Llama:
    """The small model; torch's generator is seeded anew for each test."""
    torch.manual_seed(1)
    return shared_llama


@pytest.fixture(scope="session")
def reference(small: SimpleNamespace) -> Transformer:
    """The small model as plain tensors, which only `Transformer.forward` computes with: what the others are held against."""
    return Llama.build(
        small.folder, small.tokenizer_path, max_seq_len=64, max_batch_size=6, device="cpu", backend="eager"
    ).model


@pytest.fixture
def as_on_cuda(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps in static memory, over a bucket with a mask, each launched before the ids of the one before are read."""
    run = CapturedStep.run

    def into_the_same_memory(step: CapturedStep) -> None:
        fixed = step.logits
        run(step)
        step.logits = step.logits if fixed is None else fixed.copy_(step.logits)

    monkeypatch.setattr(CapturedStep, "run", into_the_same_memory)
    monkeypatch.setattr(llama.engine, "backend", CudaGraphsBackend())
    monkeypatch.setattr(async_copy, "supports_async", lambda device: True)
    yield


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(FILES) as running:
        yield running


@pytest.fixture(params=["curl", "wget"])
def download(request: pytest.FixtureRequest, server: FaultServer, tmp_path: Path) -> Downloader:
    """With each of the two clients, the other one absent."""
    return Downloader(server, request.param, tmp_path)


@pytest.fixture
def nearly(download: Downloader) -> Downloader:
    """All but the shard is there already: it saves time."""
    for path in set(files_of("7B")) - {SHARD}:
        download.put(path, FILES[path])
    return download


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Tokenizer:
    """Llama 2's own, where download.sh left it, or where tests of others' data keep it."""
    for path in (ROOT / "tokenizer.model", ROOT.parent / "shared" / "fixtures" / "llama2" / "tokenizer.model"):
        if path.exists():
            return Tokenizer(path)
    pytest.skip("Llama 2's tokenizer is not here")
