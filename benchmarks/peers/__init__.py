"""What speed.py measures: this library, and what users would pick instead. Each runs in a process of its own (worker.py).

A peer is a class that takes a `Job`, loads the model, and answers `generate`. Each has its own file, so that a process
imports no more than its own libraries: their memory counts.
"""

import importlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

GGUF_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Job:
    """What a worker is to load. It travels as JSON, so paths are strings."""

    peer: str  # a key of PEERS, or "key:variant"
    ckpt: str  # a folder in Meta's layout, in one shard
    tokenizer: str
    converted: str  # how the paths of what convert.py writes begin
    dtype: str  # as torch names it
    device: str
    threads: int
    rows: int  # the most that a workload has
    window: int  # the most positions of a row

    @property
    def kind(self) -> str:
        """A key of PEERS."""
        return self.peer.partition(":")[0]

    @property
    def variant(self) -> str:
        return self.peer.partition(":")[2]

    @property
    def quantize(self) -> str | None:
        """Ours: the kind of weights."""
        return self.variant.removesuffix("compile").removesuffix("+") or None

    @property
    def hf(self) -> str:
        """The folder for transformers."""
        return f"{self.converted}-{self.dtype}-hf"

    @property
    def gguf(self) -> str:
        """The file for llama.cpp."""
        return f"{self.converted}-{self.variant or GGUF_TYPES[self.dtype]}.gguf"

    @property
    def openvino(self) -> str:
        """The folder for OpenVINO GenAI."""
        return self._made_from_hf("openvino")

    @property
    def ctranslate2(self) -> str:
        """The folder for CTranslate2."""
        return self._made_from_hf("ctranslate2")

    def _made_from_hf(self, kind: str) -> str:
        return "-".join(filter(None, [self.converted, self.dtype, kind, self.variant]))


class Answer(NamedTuple):
    """Seconds until the first new id of every row was there; seconds from then to the last one; the new ids."""

    first: float
    rest: float
    ids: list[list[int]]


class Peer(Protocol):
    def __init__(self, job: Job) -> None: ...

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        """Continue each prompt greedily by exactly `new` ids: no id ends it. Loading and allocating are not timed."""
        ...


class Entry(NamedTuple):
    module: str
    name: str
    variants: set[str]
    devices: tuple[str, ...] = ("cpu", "cuda")


PEERS = {
    "ours": Entry("peers.ours", "Ours", {"compile", "int8", "int4", "int8+compile", "int4+compile"}),
    "transformers": Entry("peers.hugging_face", "Transformers", set()),
    "llama.cpp": Entry("peers.llamacpp", "LlamaCpp", {"Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"}),
    "openvino": Entry("peers.open_vino", "OpenVino", {"int8", "int4"}, ("cpu",)),
    "ctranslate2": Entry("peers.ctranslate", "CTranslate2", {"int8"}, ("cpu",)),
    "reference": Entry("peers.reference", "Reference", set()),
}


def find(peer: str) -> type[Peer]:
    entry = PEERS[peer.partition(":")[0]]
    return getattr(importlib.import_module(entry.module), entry.name)


def names(device: str) -> list[str]:
    """All that can be measured on a device."""
    there = {peer: sorted(entry.variants) for peer, entry in PEERS.items() if device in entry.devices}
    return [name for peer, variants in there.items() for name in (peer, *(f"{peer}:{v}" for v in variants))]
