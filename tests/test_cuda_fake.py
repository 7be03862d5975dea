"""No operation mixes devices, and steps do not wait for the device: on CUDA tensors that have no memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

_RUN = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); import pytest; sys.exit(pytest.main(sys.argv[2:]))"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes PyTorch believe in a CUDA device; compiled, for it is an interface of C++."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    if torch.version.cuda or torch.version.hip or torch.__version__ < torch.torch_version.TorchVersion("2.13"):
        pytest.skip("needs PyTorch 2.13 or later, built for the CPU")
    made, installed = tmp_path_factory.mktemp("library") / "fake_cuda.so", Path(torch.__file__).parent
    folders = [f"-I{installed / 'include'}", f"-L{installed / 'lib'}", f"-Wl,-rpath,{installed / 'lib'}"]
    options = ["-std=c++20", "-shared", "-fPIC", "-o", str(made)]
    subprocess.run([compiler, *options, str(HERE / "fake_cuda.cpp"), *folders, "-lc10", "-ltorch_cpu"], check=True)
    return made


@pytest.mark.parametrize("file", ["on_cuda.py", "waits_on_cuda.py"])
def test_training_steps_on_cuda(library: Path, file: str) -> None:
    """What PyTorch believes in holds for a whole process, from before it is imported."""
    given = ["-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(library), *given],
        cwd=HERE.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
