"""What libraries of kernels keep for themselves: cuBLAS has a workspace for each thread that has multiplied."""

from __future__ import annotations

from functools import cache

import torch

#: What cuBLAS keeps on a Hopper GPU: 32 MiB for the thread of the forward pass, and for that of the backward pass. On
#: most other GPUs it is a quarter.
_HOPPER_BYTES = 2 * 32 * 2**20


def workspace_bytes(device: torch.device) -> int:
    """Return the bytes that stay with cuBLAS on a device once a training step has run; 0 on other devices.

    They come from PyTorch's allocator, but no tensor has them: 32 MiB a thread on Hopper, 8 MiB on most other GPUs
    (``CUBLAS_WORKSPACE_CONFIG`` changes that), for the thread of the forward pass and for that of the backward pass.
    Measured once, on a product of a few numbers. What convolutions borrow for a moment is not in it: cuDNN decides
    on that call by call.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return _measured(torch.cuda.current_device() if device == torch.device("cuda") else device.index)


def expected_workspace_bytes(kind: str) -> int:
    """Return the same for a type of device that need not be there: without a GPU, what a Hopper GPU would keep."""
    if kind != "cuda":
        return 0
    return workspace_bytes(torch.device("cuda")) if torch.cuda.is_available() else _HOPPER_BYTES


@cache
def _measured(index: int) -> int:
    device = torch.device("cuda", index)
    torch._C._cuda_clearCublasWorkspaces()
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        weight = torch.ones(16, 16, device=device, requires_grad=True)
        rows = torch.ones(16, 16, device=device)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        (gradient,) = torch.autograd.grad((rows @ weight).sum(), weight)
        torch.cuda.synchronize(device)
        gradient_bytes = gradient.untyped_storage().nbytes()
        return max(0, torch.cuda.memory_allocated(device) - before - gradient_bytes)
