"""Files that say the same thing in two places say the same: versions, make targets, pages, links."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trady

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/README.md")])


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.+]+)", read(name), re.MULTILINE))


def floors() -> dict[str, set[str]]:
    """What pyproject.toml asks for at least: of the library, and of what its tests install."""
    found: dict[str, set[str]] = {}
    benchmarks_and_site = re.compile(r"^(benchmarks|docs) = \[.*?\]$", re.MULTILINE | re.DOTALL)
    asked = benchmarks_and_site.sub(
        "", read("pyproject.toml").partition("[project]")[2].partition("[project.scripts]")[0]
    )
    for name, version in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)', asked):
        found.setdefault(name, set()).add(version)
    return found


def test_pre_commit_has_the_versions_of_the_pins() -> None:
    pinned = pins("constraints.txt")
    named = dict(
        re.findall(r"additional_dependencies: \[(ruff|codespell)==([\w.]+)\]", read(".pre-commit-config.yaml"))
    )
    assert named == {name: pinned[name] for name in ("ruff", "codespell")}


def test_the_oldest_versions_are_those_that_the_project_asks_for_at_least() -> None:
    oldest = pins("constraints-oldest.txt")
    not_tested = {"mypy", "ruff", "codespell"}  # only the pinned ones are run
    asked = {name: versions for name, versions in floors().items() if name not in not_tested}
    wrong = {
        name: (versions, oldest.get(name))
        for name, versions in asked.items()
        if not all(f"{oldest.get(name)}.".startswith(f"{version}.") for version in versions)
    }
    assert wrong == {}


def test_everything_public_is_in_the_reference() -> None:
    documented = set(
        re.findall(r"^::: trady\.(\w+)$", "".join(p.read_text() for p in ROOT.glob("docs/reference/*.md")), re.M)
    )
    assert documented >= set(trady.__all__)


def referenced() -> list[str]:
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/reference/*.md")))
    return re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)


@pytest.mark.parametrize("path", referenced())
def test_what_the_reference_shows_exists(path: str) -> None:
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        assert found.__doc__
        return


def test_every_page_of_docs_is_on_the_site() -> None:
    shown = set(re.findall(r": ([\w/-]+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    assert {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")} <= shown


def workflow_runs() -> Iterator[str]:
    yield from re.findall(r"^make .*", read(".ci/run"), re.MULTILINE)
    yield from re.findall(r"^ +- run: (.*)$", read(".github/workflows/ci.yml"), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(workflow_runs())))
def test_continuous_integration_calls_targets_of_make(command: str) -> None:
    make, target, *_ = command.split()
    assert make == "make"
    assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = read("CITATION.cff")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == trady.__version__  # type: ignore[index]
    assert "arXiv:2510.19675" in citation
    names = set(re.findall(r"family-names: (.*)$", citation, re.MULTILINE))
    assert names
    assert all(name in read("README.md") for name in names)


def test_cleaning_up_leaves_runs_alone() -> None:
    (recipe,) = re.findall(r"^clean:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert "dist" in recipe
    assert not re.search(r"\bruns\b", recipe)
