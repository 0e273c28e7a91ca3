"""Show a progress bar on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from . import groups

T = TypeVar("T")


def progress(items: list[T], weigh: Callable[[T], int], label: str, unit: str = "GB") -> Iterator[T]:
    """Yield the items. After the first second, show a progress bar on stderr, on rank 0 and on terminals only.

    weigh: a function that returns the size of an item, in bytes if `unit` is "GB", otherwise in the unit that `unit` names.
    """
    weights = [weigh(item) for item in items]
    total, done, start, last_shown = sum(weights), 0, time.monotonic(), 0.0
    visible = sys.stderr.isatty() and groups.global_rank() == 0
    for item, weight in zip(items, weights, strict=True):
        yield item
        done += weight
        now = time.monotonic()
        if visible and now - start > 1 and (now - last_shown > 0.1 or done == total):
            last_shown = now
            bar = "#" * (30 * done // max(total, 1))
            scale, digits = (1e9, 1) if unit == "GB" else (1, 0)
            amounts = [f"{n / scale:,.{digits}f}" for n in (done, total, done / (now - start))]
            text = "{} of {} {unit}, {} {unit}/s".format(*amounts, unit=unit)
            print(f"\r{label} [{bar:<30}] {text}", end="", file=sys.stderr)
    if last_shown:
        print(file=sys.stderr)
