"""Copy tensors from the device to the host without waiting for work launched later."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ..distributed import failures, groups


def supports_async(device: torch.device) -> bool:
    """Return True if the host can launch a decode step while the device still runs the previous step."""
    return device.type == "cuda"


def async_to_host(*tensors: torch.Tensor) -> Callable[[], list[list[Any]]]:
    """Start copying tensors to the host. Return a function that waits for these copies only, and returns the values as lists.

    The returned function raises PeerFailed if another rank fails during the wait.
    """
    if not all(tensor.is_cuda for tensor in tensors):
        return lambda: [tensor.tolist() for tensor in tensors]
    buffers = (torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True) for t in tensors)
    copies = [buffer.copy_(t, non_blocking=True) for buffer, t in zip(buffers, tensors, strict=True)]
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[list[Any]]:
        start = last_check = time.monotonic()
        # Poll, since a copy that is queued behind a collective never completes if another rank has failed.
        while groups.world_size() > 1 and not copied.query():
            now = time.monotonic()
            if now - start > 0.002:
                time.sleep(0.0001)
            if now - last_check > 1:
                last_check = now
                if reason := failures.peer_failure_reason():
                    raise failures.PeerFailed(reason)
        copied.synchronize()
        return [copy.tolist() for copy in copies]

    return wait
