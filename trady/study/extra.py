"""Packages that a study needs in addition."""

from __future__ import annotations

from importlib.util import find_spec

from trady.errors import TrainingError

PACKAGES = ("pyarrow", "scipy", "powerlaw", "matplotlib")


def check_installed() -> None:
    """Refuse a study for which a package is missing.

    Raises:
        TrainingError: The message names what is missing, and what to type.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise TrainingError(f'a study needs {", ".join(missing)}: pip install "trady[study]"')
