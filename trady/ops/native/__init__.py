"""Loads the C kernels, compiled once with the machine's own compiler and kept in the user's cache.

A library is loaded only if nobody else could have written it and it is as long and has the digest that its name says.

No compiler, no cache, ``TRADY_NATIVE=0``: :func:`library` returns ``None`` and the callers use
plain PyTorch, which gives the same results more slowly. The kernels run on the threads that
PyTorch uses itself (the OpenMP runtime it has loaded), so ``torch.set_num_threads`` holds for both.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from trady.ops.context import simulated_device_type
from trady.ops.parameter_class import is_parameter_class

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("bits.c", "pool.c", "depthwise.c", "pages.c", "loss.c", "smooth.c", "writes.c")
)

_POINTER, _COUNT, _FLOAT, _HALF = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_uint16
_SIGNATURES = {
    "trady_clamp_f32": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 3,
    "trady_select_f32": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT],
    "trady_clamp_bf16": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2 + [_HALF] * 2,
    "trady_select_bf16": [_POINTER] * 3 + [_COUNT] * 2,
    "trady_max_pool_f32": [_POINTER] * 4,
    "trady_max_pool_f64": [_POINTER] * 4,
    "trady_max_pool_gradient_f32": [_POINTER] * 4,
    "trady_max_pool_gradient_f64": [_POINTER] * 4,
    "trady_depthwise": [_POINTER] * 5,
    "trady_depthwise_input": [_POINTER] * 4,
    "trady_depthwise_weight": [_POINTER] * 3 + [_COUNT] + [_POINTER] * 2,
    "trady_large_pages": [_POINTER, _COUNT],
    "trady_same_slices": [_POINTER, _COUNT],
    "trady_row_losses": [_POINTER] * 3 + [_COUNT] * 3,
    "trady_row_loss_gradient": [_POINTER] * 4 + [_COUNT] * 3,
    "trady_encode_f32": [_POINTER] * 3 + [_COUNT, _POINTER],
    "trady_encode_bf16": [_POINTER] * 3 + [_COUNT, _POINTER],
    "trady_decode_f32": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2,
    "trady_decode_bf16": [_POINTER] * 3 + [_COUNT] * 2 + [_FLOAT] * 2,
}

#: These return whether there was memory for their temporaries, the last whether slices are the same.
_TELL = ("trady_depthwise", "trady_depthwise_input", "trady_depthwise_weight", "trady_same_slices")

#: From this size on the allocator asks the system each time; smaller tensors mostly get memory used before.
_LARGE_BYTES = 32 << 20

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

#: Tried in this order; the last one asks nothing special of compiler or machine.
_COMPILE_FLAGS = (
    ["-O3", "-march=native", "-fopenmp"],
    ["-O3", "-fopenmp"],
    ["-O3", "-march=native"],
    ["-O3"],
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or ``None`` where they cannot be had."""
    if os.environ.get("TRADY_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    for folder in _cache_folders():
        for flags in _COMPILE_FLAGS:
            loaded = _build_and_load(compiler, flags, folder)
            if loaded is not None:
                return loaded
    return None


def on_this_processor(*tensors: Tensor) -> bool:
    """Whether the tensors have real memory on the CPU that a C function can read."""
    return all(t.device.type == "cpu" and (type(t) is Tensor or is_parameter_class(type(t))) for t in tensors)


def on_a_processor(*tensors: Tensor) -> bool:
    """Whether the tensors have such memory, or are fake tensors for it, so that predictions allocate alike."""
    metas = [t.is_meta for t in tensors]
    return simulated_device_type.get() == "cpu" if all(metas) else on_this_processor(*tensors)


@functools.lru_cache(maxsize=4096)
def numbers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """Return integers as a C array; equal ones are made once."""
    return (ctypes.c_int64 * len(values))(*values)


def unwritten(x: Tensor) -> Tensor:
    """Ask for large pages for a large tensor that nothing was written to yet; return it."""
    if x.numel() * x.element_size() >= _LARGE_BYTES and on_this_processor(x):
        kernels = library()
        if kernels is not None:
            kernels.trady_large_pages(x.data_ptr(), x.numel() * x.element_size())
    return x


def _cache_folders() -> list[Path]:
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folders = [Path(tempfile.gettempdir()) / f"trady-{user}"]
    with contextlib.suppress(RuntimeError):  # the user of a container may have no home
        folders.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "trady")
    return folders


def _build_and_load(compiler: str, flags: list[str], folder: Path) -> ctypes.CDLL | None:
    sources = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(sources + " ".join([compiler, *flags, _processor()]).encode()).hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not all(_is_ours(state) for state in (folder.lstat(), folder.stat())):
            return None
        path = _kept(folder, key)
        if path is None:
            path = _keep(compiler, flags, folder, key)
        # Imported by torch already: its OpenMP runtime satisfies the kernels' undefined symbols.
        loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, ctypes.c_int if name in _TELL else None
    except (AttributeError, OSError, subprocess.SubprocessError):
        return None
    return loaded


def _is_ours(state: os.stat_result) -> bool:
    """Return whether nobody else can have written what is run from here; of a link only its owner counts."""
    if not hasattr(os, "getuid"):
        return True
    return state.st_uid == os.getuid() and (stat.S_ISLNK(state.st_mode) or not state.st_mode & _WRITABLE_BY_OTHERS)


def _kept(folder: Path, key: str) -> Path | None:
    """Return the library of an earlier run, if it is whole and ours; remove any that is not.

    Its name says its length and its digest. A truncated library would end every process that loads it with SIGBUS.
    """
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        length, _, digest = path.stem.removeprefix(f"kernels-{key}-").partition("-")
        state = path.lstat()
        whole = stat.S_ISREG(state.st_mode) and _is_ours(state) and str(state.st_size) == length
        if whole and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return path
        with contextlib.suppress(OSError):  # a folder
            path.unlink()
    return None


def _keep(compiler: str, flags: list[str], folder: Path, key: str) -> Path:
    """Compile the kernels, and give the library its name once it is on the disk completely."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "kernels.so"
        _build(compiler, flags, made)
        made.chmod(0o600)
        content = made.read_bytes()
        path = folder / f"kernels-{key}-{len(content)}-{hashlib.sha256(content).hexdigest()}.so"
        _flush(made)
        made.replace(path)
        _flush(folder)
    return path


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build(compiler: str, flags: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 120}
        made = [str(Path(scratch) / f"{source.stem}.o") for source in SOURCES]
        for source, target in zip(SOURCES, made, strict=True):
            subprocess.run([compiler, *flags, "-fPIC", "-c", str(source), "-o", target], **quiet)  # type: ignore[call-overload]
        linked = Path(scratch) / "kernels.so"
        # Linked without -fopenmp on purpose: naming a second OpenMP runtime would start a second thread pool.
        subprocess.run([compiler, "-shared", *made, "-o", str(linked)], **quiet)  # type: ignore[call-overload]
        linked.replace(path)


def _processor() -> str:
    """Name what ``-march=native`` depends on, so that a shared home never loads another machine's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor() + platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
