"""TODO."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ..distributed import failures, groups


def supports_async(device: torch.device) -> bool:
    """Whether the host may launch the next step while the device still computes this one."""
    return device.type == "cuda"


def async_to_host(*tensors: torch.Tensor) -> Callable[[], list[list[Any]]]:
    """Send tensors to the host; the call returned waits for them, and for nothing launched since, and gives lists."""
    if not all(tensor.is_cuda for tensor in tensors):
        return lambda: [tensor.tolist() for tensor in tensors]
    room = (torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True) for t in tensors)
    copies = [here.copy_(t, non_blocking=True) for here, t in zip(room, tensors, strict=True)]
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[list[Any]]:
        begun = asked = time.monotonic()
        while groups.world_size() > 1 and not arrived.query():  # a collective with a rank that failed would never end
            now = time.monotonic()
            if now - begun > 0.002:
                time.sleep(0.0001)
            if now - asked > 1:
                asked = now
                if reason := failures.peer_failure_reason():
                    raise failures.PeerFailed(reason)
        arrived.synchronize()
        return [copy.tolist() for copy in copies]

    return wait
