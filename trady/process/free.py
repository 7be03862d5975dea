"""The memory that is free: of the device that trains."""

from __future__ import annotations

from pathlib import Path


def memory_left() -> int | None:
    """Return how many bytes this process could still take: of the machine's, its group's and its own limit."""
    found = [left for left in (_of_machine(), _of_group(), _of_process()) if left is not None]
    return max(0, min(found)) if found else None


def free_memory() -> tuple[int | None, str]:
    """Return the bytes that are free where a run would train, and what that is; ``None`` where the system is silent."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(free), torch.cuda.get_device_name()
    return memory_left(), "this machine"


def _of_machine() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _of_group() -> int | None:
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    return int(limit[0]) - int(used[0]) if limit and used and limit[0].isdecimal() else None


def _of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = _lines("/proc/self/statm")
    return limit - int(used[0].split()[0]) * resource.getpagesize() if used else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
