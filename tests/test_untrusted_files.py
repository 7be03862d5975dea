"""Data, folders, names and kernels that somebody else made: looked at before memory is taken or code is run."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import trady
from tests.little_memory import little_memory
from tests.small_task import write_npz
from trady import load_data
from trady.errors import DataError, FileError, ModelError, ResourceError
from trady.ops import native
from trady.process import free
from trady.training.data import decoding, room
from trady.training.data.fashion_mnist import read_idx

ROOT = Path(trady.__file__).parent.parent


# -- .npz ----------------------------------------------------------------------------------------------------------


def images(count: int) -> np.ndarray:
    return np.zeros((count, 4, 4, 3), np.uint8)


def test_one_wild_label_does_not_make_a_head_of_a_thousand_million(tmp_path: Path) -> None:
    place = tmp_path / "d.npz"
    np.savez(place, images=images(4), labels=np.array([0, 1, 2, 10**9]))
    said = r"largest label is 1000000000, but only 4 classes occur \(0, 1, 2, 1e\+09\).*classes"
    with pytest.raises(DataError, match=said):
        load_data(place, image_size=4)
    np.savez(place, images=images(4), labels=np.array([0, 255, 0, 255]))
    with pytest.raises(DataError, match="return_inverse=True"):
        load_data(place, image_size=4)


def test_gaps_in_labels_are_fine_up_to_a_factor_and_where_classes_are_named(tmp_path: Path) -> None:
    place = tmp_path / "d.npz"
    np.savez(place, images=images(4), labels=np.array([0, 1, 19, 0]))
    assert len(load_data(place, image_size=4).classes) == 20
    names = np.array([f"class {number}" for number in range(500)])
    np.savez(place, images=images(4), labels=np.array([0, 499, 0, 1]), classes=names)
    assert load_data(place, image_size=4).classes[499] == "class 499"


@pytest.mark.parametrize("labels", [[0.0, np.nan], [0.0, np.inf]], ids=str)
def test_labels_that_are_no_numbers_are_refused(tmp_path: Path, labels: list[float]) -> None:
    np.savez(tmp_path / "d.npz", images=images(2), labels=np.array(labels))
    with pytest.raises(DataError, match="not all finite"):
        load_data(tmp_path / "d.npz", image_size=4)


def zipped(path: Path, parts: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def npy(array: np.ndarray, shape: str | None = None) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    if shape is None:
        return out.getvalue()
    content = out.getvalue()
    header = re.sub(rb"\([\d, ]*\)", shape.encode(), content[10:128])[:118].rstrip().ljust(117) + b"\n"
    return content[:10] + header + content[128:]


LABELS = npy(np.array([0, 1]))


def test_a_header_that_asks_for_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    lying = npy(images(2), shape="(100000, 4000, 4000)")
    place = zipped(tmp_path / "d.npz", {"images.npy": lying, "labels.npy": LABELS})
    with (
        little_memory(1 << 30),
        pytest.raises(DataError, match=r"is to be \[100000, 4000, 4000\] uint8, .* and has 96"),
    ):
        load_data(place, image_size=4)


def test_a_bomb_is_refused_by_what_it_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint8, shape=(2, 6000, 6000, 3))
    del big
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "big.npy", "images.npy")
        archive.writestr("labels.npy", LABELS)
    assert (tmp_path / "d.npz").stat().st_size < 1 << 20
    monkeypatch.setattr(room, "memory_left", lambda: 100 << 20)
    with pytest.raises(ResourceError, match=r"take 206.0 MiB of memory, and 100.0 MiB are left; nothing was read"):
        load_data(tmp_path / "d.npz", image_size=4)


def test_sizes_that_no_compression_reaches_and_parts_on_top_of_each_other_are_refused(tmp_path: Path) -> None:
    content = bytearray(zipped(tmp_path / "d.npz", {"images.npy": npy(images(2)), "labels.npy": LABELS}).read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 24 : at + 28] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="cut short, or a zip bomb"):
        load_data(tmp_path / "d.npz", image_size=4)
    content[at + 20 : at + 24] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="on top of each other"):
        load_data(tmp_path / "d.npz", image_size=4)


def test_only_what_numpy_writes_is_decompressed(tmp_path: Path) -> None:
    parts = {"images.npy": npy(images(2)), "labels.npy": LABELS}
    with pytest.raises(DataError, match="in a way that NumPy never uses"):
        load_data(zipped(tmp_path / "d.npz", parts, zipfile.ZIP_LZMA), image_size=4)


def test_arrays_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    parts = {"images.npy": npy(images(2)), "labels.npy": LABELS, "notes.npy": b"no array at all"}
    place = zipped(tmp_path / "d.npz", parts)
    assert len(load_data(place, image_size=4).train) == 1


def test_a_gzipped_bomb_is_read_up_to_the_size_of_a_data_set(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(100 << 20), 1))
    with pytest.raises(DataError, match="holds more than 67108864 bytes"):
        read_idx(tmp_path / "x.gz")


def test_what_is_left_of_memory_is_the_least_of_the_limits() -> None:
    left = free.memory_left()
    assert left is not None
    with little_memory(50 << 20):
        assert (free.memory_left() or 0) <= 50 << 20
    room.check_room(1 << 10, "a little")


# -- folders of images ---------------------------------------------------------------------------------------------


def photos(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((6, 8, 3), 40 * number, np.uint8)).save(folder / name / f"{number}.png")
    return folder


def test_pipes_and_sockets_are_skipped_and_named(tmp_path: Path) -> None:
    folder = photos(tmp_path / "p")
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "dog" / "link.jpg").symlink_to(folder / "cat" / "pipe.png")
    (folder / "dog" / "device.gif").symlink_to("/dev/zero")
    (folder / "dog" / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as there:
        place = Path(os.path.relpath(folder / "cat" / "socket.png"))
        there.bind(str(place))
        found = load_data(folder, image_size=4)
    assert {Path(name).name for name in found.skipped} == {"pipe.png", "link.jpg", "device.gif", "socket.png"}
    assert len(found.train) + len(found.evaluation) == 6


def test_an_image_that_says_it_is_huge_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    folder = photos(tmp_path / "p")
    (folder / "cat" / "huge.ppm").write_bytes(b"P6 12000 12000 255\n" + bytes(99))
    with little_memory(1 << 30), pytest.raises(DataError, match=r"huge\.ppm.*12000 × 12000 pixels"):
        load_data(folder, image_size=4)
    found = load_data(folder, image_size=4, on_unreadable="skip")
    assert [Path(name).name for name in found.skipped] == ["huge.ppm"]


def test_a_full_disk_is_an_error_before_decoded_images_are_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoding, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        load_data(photos(tmp_path / "p"), image_size=4)


# -- names in figures, pages and tables ----------------------------------------------------------------------------

NAME = "$x_1 < y$ [/b] _a <b>&\\frac{}"


def test_a_name_with_mathematics_or_markup_is_drawn_as_it_is() -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from trady.report.figures import STYLE, as_png, as_svg, label

    with mpl.rc_context(STYLE):
        figure = Figure()
        axis = figure.add_subplot()
        for name in (NAME, "$", "$$", r"\$x$", "_hidden", "<svg onload='x'>"):
            axis.plot([1, 2], label=label(name))
            axis.set_title(name)
        legend = axis.legend()
        text = as_svg(figure)
        as_png(figure, 50)
    assert [entry.get_text().strip() for entry in legend.get_texts()][4] == "_hidden"
    assert "<svg onload" not in text


def test_every_figure_is_drawn_in_that_style() -> None:
    from trady.report.figures import STYLE

    assert STYLE["text.parse_math"] is False
    for path in (ROOT / "trady").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "savefig" in source or "as_svg(" in source:
            assert "STYLE" in source or path.name == "demo_table.py", f"{path} draws without the style"


def test_tables_print_names_as_they_are() -> None:
    from rich.console import Console

    from trady.compare.show import _table
    from trady.report.page import Table, page
    from trady.report.texts import markdown

    values = Table(["policy", NAME], [[NAME, "0.5"], ["[bold]", "p < 0.05"]], "about [/x]")
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(_table(values))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert NAME in shown
    assert "[bold]" in shown
    assert "about [/x]" in shown
    html = page(NAME, NAME, [])
    assert "<b>" not in html
    text = markdown(values)
    assert r"\<b>" in text
    assert "p < 0.05" in text


# -- code that nobody asked for ------------------------------------------------------------------------------------

LOADERS = {"from_pretrained", "from_config", "load_dataset", "read_config"}


def test_no_code_of_a_models_or_a_data_sets_is_ever_run() -> None:
    calls = []
    for path in [*(ROOT / "trady").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                value = given.get("trust_remote_code")
                refused = isinstance(value, ast.Constant) and value.value is False
                spread = None in given and "no_code" in ast.dump(node)
                calls.append((path.name, refused or spread))
    assert len(calls) >= 5
    assert [name for name, refused in calls if not refused] == []


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}')
    (tmp_path / "code.py").write_text("import pathlib\npathlib.Path('ran').touch()\nclass Own: pass\n")
    from trady.training.models.load import image_format

    with pytest.raises(ModelError, match="Python code of its own, which trady never runs"):
        image_format(str(tmp_path))
    assert not Path("ran").exists()


def in_folder(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trady", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_file_in_the_current_folder_is_not_run_in_the_place_of_a_library(tmp_path: Path) -> None:
    for name in ("matplotlib", "pydantic", "PIL", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"open('ran-{name}', 'w')\nraise SystemExit(9)\n")
    (tmp_path / "mine.py").write_text("import torch\nopen('ran-mine', 'w')\ndef net(n): return torch.nn.Linear(4, n)\n")
    (tmp_path / "m.toml").write_text(
        'models = ["mine:net"]\ndatasets = ["fashion-mnist"]\npolicies = ["head"]\ntraining = {epochs = 1}\n'
    )
    done = in_folder(tmp_path, "compare", "m.toml", "--summary-only", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("ran-*")) == []
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_current_folder_is_importable_while_a_persons_function_is_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_a.py").write_text(
        "import torch\ndef net(classes):\n    import mine_b\n    return torch.nn.Linear(4, mine_b.OUT)\n"
    )
    (tmp_path / "mine_b.py").write_text("OUT = 7\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    from trady.training.models.load import load_model

    model: Any = load_model("mine_a:net", 3).model
    assert model.out_features == 7
    assert sys.path == before
    (tmp_path / "broken_c.py").write_text("def net(:\n")
    with pytest.raises(ModelError, match="no function 'net' in module 'broken_c'"):
        load_model("broken_c:net", 3)
    assert sys.path == before


# -- compiled kernels ----------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no compiler here")


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Any, int]]:
    """Build or load kernels in a folder of their own; return them and how often a compiler ran."""
    runs: list[int] = []
    compile_, compiler = native._build, shutil.which("cc") or ""

    def counted(*given: Any) -> None:
        runs.append(1)
        compile_(*given)

    monkeypatch.setattr(native, "_build", counted)

    def build() -> tuple[Any, int]:
        runs.clear()
        return native._build_and_load(compiler, ["-O1"], tmp_path / "cache"), len(runs)

    return build


def kept(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").glob("*.so")
    return path


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "longer", "changed", "writable by others", "a link", "a folder"])
def test_kernels_that_are_not_whole_and_ours_are_built_again(
    tmp_path: Path, build: Callable[[], tuple[Any, int]], damage: str
) -> None:
    assert build()[1] == 1
    assert build()[1] == 0, "they are kept"
    path = kept(tmp_path)
    content = path.read_bytes()
    path.unlink()  # this process has loaded it: a new file of that name is what the next process finds
    changed = {
        "truncated": content[:5000],
        "longer": content + b"\0",
        "changed": content[:3000] + b"\xcc" + content[3001:],
    }
    if damage == "a link":
        (tmp_path / "elsewhere.so").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere.so")
    elif damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(changed.get(damage, content))
        path.chmod(0o666 if damage == "writable by others" else 0o600)
    loaded, runs = build()
    assert runs == 1
    if damage == "a folder":  # its name is taken: PyTorch computes instead
        assert loaded is None
    else:
        assert loaded is not None
        assert kept(tmp_path).read_bytes() == content


@needs_compiler
def test_kernels_are_not_kept_where_others_can_write(tmp_path: Path, build: Callable[[], tuple[Any, int]]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert build() == (None, 0)
    (tmp_path / "cache").chmod(0o700)
    assert build()[0] is not None


@needs_compiler
def test_kernels_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, build: Callable[[], tuple[Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(native, "_flush", lambda path: flushed.append(f"{path.name}: {len(list_of(tmp_path))}"))
    build()
    assert flushed == ["kernels.so: 0", "cache: 1"]


def list_of(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*.so"))


def test_a_folder_of_data_that_cannot_be_read_is_an_error_of_the_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_npz(tmp_path / "d.npz")

    def refuse(*given: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(Path, "iterdir", refuse)
    (tmp_path / "p").mkdir()
    with pytest.raises((DataError, FileError), match="Permission denied"):
        load_data(tmp_path / "p", image_size=4)
