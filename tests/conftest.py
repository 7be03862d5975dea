"""What all tests share."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from trady.ops import recompute

# A shared machine may take its time with any one example.
settings.register_profile("trady", deadline=None)
settings.load_profile("trady")

# In the background of a script Ctrl-C is switched off, also for what the tests start; some of them press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def no_priors_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What ``trady rank`` has kept in somebody's home must not decide a test."""
    folder = tmp_path_factory.mktemp("priors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRADY_PRIORS", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_priors_of_other_tests(no_priors_of_the_user: Path) -> Iterator[None]:
    """Nor what it has kept in a test before."""
    yield
    for prior in no_priors_of_the_user.iterdir():
        prior.unlink()


@pytest.fixture
def no_mode_stays_behind() -> Iterator[None]:
    from torch.overrides import _get_current_function_mode_stack

    yield
    assert _get_current_function_mode_stack() == []


@pytest.fixture
def one_sample_a_part(no_mode_stays_behind: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models would fit into one part."""
    import trady.interception.deferred_segment

    monkeypatch.setattr(trady.interception.deferred_segment, "_CHUNK_BYTES", 1)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of parts of every segment computed, forward and backward."""
    from trady.ops import recompute

    counts: list[int] = []
    plain = recompute.Recipe.chunks

    def counted(recipe: recompute.Recipe) -> Iterator[recompute.Chunk]:
        found = list(plain(recipe))
        counts.append(len(found))
        return iter(found)

    monkeypatch.setattr(recompute.Recipe, "chunks", counted)
    return counts


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one tiny backbone, weights as trained ones come: no batch counters."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.backbones import Backbone
    from tests.small_workloads import architecture

    torch.manual_seed(0)
    described = architecture()
    state = {k: torch.rand_like(v.float()) for k, v in Backbone(described).state_dict().items()}
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.json").write_text(json.dumps(described))
    return tmp_path
