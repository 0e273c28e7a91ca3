"""The peers that speed.py measures: this library, and other libraries that run the same models.

A peer is a class that loads the model of a `Job` and implements `generate`. Each peer runs in its own process (worker.py) and
has its own module, so that a process imports only the measured library: imports count in the measured memory.
"""

import importlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

GGUF_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Job:
    """The model that a worker loads, and the limits of its workloads. Paths are strings, because a job is sent as JSON."""

    peer: str  # a key of PEERS, alone or with a variant, as in "llama.cpp:Q8_0"
    ckpt: str  # folder of a checkpoint in Meta's layout, with one shard
    tokenizer: str  # path of tokenizer.model
    converted: str  # prefix of the paths of all files that convert.py writes
    dtype: str  # name of a torch dtype, as in "bfloat16"
    device: str
    threads: int
    rows: int  # the largest batch size of the workloads
    context: int  # the largest context length of the workloads, in tokens

    @property
    def library(self) -> str:
        """Return the name of the peer without its variant: a key of PEERS."""
        return self.peer.partition(":")[0]

    @property
    def variant(self) -> str:
        return self.peer.partition(":")[2]

    @property
    def quantize(self) -> str | None:
        """Return the weight format in a variant of this library, as in "int8" for "int8+compile"; None for "compile" or ""."""
        return self.variant.removesuffix("compile").removesuffix("+") or None

    @property
    def hf(self) -> str:
        """Return the path of the folder that contains the model in the format of transformers."""
        return f"{self.converted}-{self.dtype}-hf"

    @property
    def gguf(self) -> str:
        """Return the path of the GGUF file that contains the model for llama.cpp."""
        return f"{self.converted}-{self.variant or GGUF_TYPES[self.dtype]}.gguf"

    @property
    def openvino(self) -> str:
        """Return the path of the folder that contains the model in the format of OpenVINO GenAI."""
        return self._path("openvino")

    @property
    def ctranslate2(self) -> str:
        """Return the path of the folder that contains the model in the format of CTranslate2."""
        return self._path("ctranslate2")

    def _path(self, library: str) -> str:
        return "-".join(filter(None, [self.converted, self.dtype, library, self.variant]))


class Answer(NamedTuple):
    """The new tokens of all rows, and the seconds in which they were generated."""

    first: float  # seconds until every row had its first new token
    rest: float  # seconds for all later tokens
    tokens: list[list[int]]


class Peer(Protocol):
    def __init__(self, job: Job) -> None: ...

    def generate(self, prompts: list[list[int]], new: int) -> Answer:
        """Continue each prompt greedily by exactly `new` tokens, also past EOS. The times exclude loading and allocation."""
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


def import_peer(peer: str) -> type[Peer]:
    entry = PEERS[peer.partition(":")[0]]
    return getattr(importlib.import_module(entry.module), entry.name)


def peer_names(device: str) -> list[str]:
    """Return the names of all peers that run on a device, without a variant and with each variant."""
    variants = {peer: sorted(entry.variants) for peer, entry in PEERS.items() if device in entry.devices}
    return [name for peer, names in variants.items() for name in (peer, *(f"{peer}:{variant}" for variant in names))]
