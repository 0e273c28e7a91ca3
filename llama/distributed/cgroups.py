"""Read the memory limits and the CPU quotas of this process's Linux control groups (cgroups), of version 1 and version 2.

A limit of a cgroup holds for all cgroups inside it. So the limits of the process's own cgroup and of all its ancestors apply,
and the least of them is effective. In a container, only the ancestors inside the container are visible.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NO_LIMIT = 1 << 62  # a cgroup of version 1 without a memory limit reports about 2**63 bytes as its limit
ROOT = Path("/")


class Limit(NamedTuple):
    """A limit, and the file that sets it."""

    value: float
    file: Path


def free_memory(root: Path = ROOT) -> Limit | None:
    """Return the bytes that this process's cgroups may still allocate, and the file of the effective limit; None without one.

    Linux frees file pages and reclaimable slabs before it refuses memory, so they count as free, also if they are mapped or
    dirty, as in MemAvailable of /proc/meminfo. Pages of tmpfs and of shared memory do not count as free.
    root: the folder that contains proc and the mounted file systems.
    """
    limits = []
    for folder in _folders("memory", root):
        for name, usage, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.high", "memory.current", ""),  # beyond `high`, Linux kills no process, but slows it down to a crawl
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit = _numbers(folder / name)[0]
            if limit is not None and limit < NO_LIMIT:
                stat = _read_stat(folder / "memory.stat")
                reclaimable = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
                reclaimable += stat.get("slab_reclaimable", 0)
                used = max((_numbers(folder / usage)[0] or 0) - reclaimable, 0)
                limits.append(Limit(max(limit - used, 0), folder / name))
    return min(limits, default=None)


def cpu_quota(root: Path = ROOT) -> Limit | None:
    """Return the number of CPU cores whose time this process's cgroups may use, and the file of the quota; None without one."""
    limits = []
    for folder in _folders("cpu", root):
        for name, period_file in (("cpu.max", "cpu.max"), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            quota, period = _numbers(folder / name)[0], _numbers(folder / period_file)[-1]
            if quota and period:
                limits.append(Limit(quota / period, folder / name))
    return min(limits, default=None)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroups that may limit `controller`: its own cgroup and all visible ancestors."""
    paths = dict[str, str]()  # a dict from each controller of version 1, and "" for version 2, to the path of the cgroup
    for line in _read_lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _read_lines(root / "proc/self/mountinfo"):
        mount, filesystem = (part.split() for part in (line.partition(" - ")[0], line.partition(" - ")[2]))
        if len(mount) < 5 or len(filesystem) < 3 or filesystem[0] not in ("cgroup", "cgroup2"):
            continue
        is_v1 = filesystem[0] == "cgroup"
        path = paths.get(controller if is_v1 else "", "")
        if not path.startswith("/") or (is_v1 and controller not in filesystem[2].split(",")):
            continue
        # `mounted` is the cgroup that appears at the mount point. It is not "/" if a container sees only a part of the tree.
        mounted, mount_point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in mount[3:5])
        inside, top = os.path.relpath(path, mounted), root / mount_point.lstrip("/")
        own = top if inside.startswith("..") else top / inside
        if mounted.startswith("/.."):
            own = _search(top, mounted.count("..") * "*/" + glob.escape(path.strip("/"))) or own
        yield from (folder for folder in (own, *own.parents) if folder == top or top in folder.parents)


def _search(top: Path, pattern: str) -> Path | None:
    """Return the cgroup of this process among those that match a pattern below `top`; None if it is not there.

    In a namespace whose root is a cgroup below the one at the mount point, Linux hides the names of the cgroups in between.
    """
    pid = str(os.getpid())
    return next((folder for folder in top.glob(pattern) if pid in _read_lines(folder / "cgroup.procs")), None)


def _read_lines(file: Path) -> list[str]:
    """Return the lines of a file; an empty list if it cannot be read."""
    with contextlib.suppress(OSError):
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []


def _numbers(file: Path) -> list[int | None]:
    """Return the words in the first line of a file as numbers; None for a word such as "max" or "-1" that sets no limit."""
    words = " ".join(_read_lines(file)[:1]).split()
    return [int(word) if word.isdecimal() else None for word in words] or [None]


def _read_stat(file: Path) -> dict[str, int]:
    """Return the numbers in a file of lines "name number"."""
    words = (line.split() for line in _read_lines(file))
    return {line[0]: int(line[1]) for line in words if len(line) == 2 and line[1].isdecimal()}
