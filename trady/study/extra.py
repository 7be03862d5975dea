"""What a study needs beside the library itself."""

from __future__ import annotations

from importlib.util import find_spec

from trady.errors import TrainingError

PACKAGES = ("pyarrow", "scipy", "powerlaw", "matplotlib")


def check_installed() -> None:
    """Refuse a study that would end for want of a package.

    Raises:
        TrainingError: The message names what is missing, and what to type.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise TrainingError(f'a study needs {", ".join(missing)}: pip install "trady[study]"')
