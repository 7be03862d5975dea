"""Tables of texts: CSV, TSV, JSON lines, Parquet, text files, folders of them, and data sets of the Hub.

They are read by the ``datasets`` package, into columns.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trady.errors import DataError, ResourceError, TradyError
from trady.records.reading import read_bytes
from trady.records.translated import in_our_words
from trady.training.data.no_code import no_code
from trady.training.texts.names import HEADER_WORDS

#: How ``datasets`` calls what a file with this ending is.
BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}

#: Parts of a data set by what a file's name begins with; of those to evaluate on, the first that is there is taken.
TRAIN = ("train", "training")
EVALUATION = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")

#: A data set on the Hub: ``owner/name``, and ``owner/name:configuration``.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

#: Names that the columns of a table without a header get, where it has two.
_HEADLESS = ("text", "label")


@dataclass(frozen=True)
class Table:
    """Rows of a source, by column.

    Attributes:
        name: Where they come from, for people.
        columns: Values by name, all equally many.
        class_names: Of columns that are known to hold numbers of classes, their names.
        remarks: What a person should know about how it was read.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, index: Sequence[int]) -> Table:
        """Return the rows at ``index``."""
        columns = {name: [values[at] for at in index] for name, values in self.columns.items()}
        return Table(self.name, columns, self.class_names, self.remarks)


def is_texts(source: str) -> bool:
    """Return whether a source is meant to be one of texts: a file or folder of tables, or a name on the Hub."""
    path = Path(source)
    if path.is_dir():
        return bool(_files(path)) and not _has_classes(path)
    if path.suffix.lower() in BUILDERS:
        return True
    return not path.exists() and _HUB_NAME.fullmatch(source) is not None and not path.parent.exists()


def read_tables(source: str, evaluation: str | None = None) -> tuple[Table, Table | None]:
    """Read the rows to train on and, where there are some apart, those to evaluate on.

    Args:
        source: A file, a folder or a name on the Hub.
        evaluation: A file of rows to evaluate on.

    Raises:
        DataError: Something cannot be read; the message says what is there.
    """
    apart = None if evaluation is None else read_file(Path(evaluation))
    path = Path(source)
    if path.is_dir():
        train, found = _of_folder(path)
        return train, apart or found
    if path.exists() or path.suffix.lower() in BUILDERS:
        return read_file(path), apart
    train, found = _of_hub(source)
    return train, apart or found


def read_file(path: Path) -> Table:
    """Read one file.

    Raises:
        DataError: It does not exist, or is no table.
    """
    if path.suffix.lower() not in BUILDERS:
        raise DataError(f"{path} is no table of texts; those that are read end in {', '.join(BUILDERS)}")
    if not path.is_file():
        raise DataError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")
    if BUILDERS[path.suffix.lower()] == "text":
        return Table(str(path), {"text": [_decoded(path)]}, remarks=())
    if BUILDERS[path.suffix.lower()] == "csv":
        return _of_csv(path)
    return _loaded(BUILDERS[path.suffix.lower()], path)


def read_lines(name: str, text: str) -> Table:
    """Return a text as a table with a row a line; empty lines are left out."""
    return Table(name, {"text": [line for line in text.splitlines() if line.strip()]})


def _of_folder(folder: Path) -> tuple[Table, Table | None]:
    files = _files(folder)
    train = [path for path in files if _part(path) == "train"]
    parts = {name: [path for path in files if _part(path) == name] for name in EVALUATION}
    apart = next((found for name in EVALUATION if (found := parts[name])), None)
    if not train:
        if apart is not None:
            raise DataError(f"{folder} has {apart[0].name} but no file called train.* beside it")
        if len(files) > 1 and not all(path.suffix.lower() == ".txt" for path in files):
            names = ", ".join(path.name for path in files[:5])
            raise DataError(
                f"{folder} has {len(files)} tables ({names}), and none is called train.*: give one of them as DATASET, "
                "and another one as --evaluation"
            )
        train = files
    return _together(folder, train), None if apart is None else _together(folder, apart)


def _files(folder: Path) -> list[Path]:
    """Return the tables in a folder, or in ``data/`` below it, where data sets of the Hub have them."""
    for place in (folder, folder / "data"):
        try:
            found = sorted(p for p in place.iterdir() if p.suffix.lower() in BUILDERS and p.name[0] not in "._")
        except OSError:
            continue
        if found:
            # What describes a data set is no part of it.
            return [path for path in found if path.is_file() and path.stem not in ("dataset_infos", "README")]
    return []


def _has_classes(folder: Path) -> bool:
    """Return whether there are folders in it, as in one of images, which may have a table or a note beside."""
    try:
        return any(path.is_dir() and path.name[0] not in "._" and path.name != "data" for path in folder.iterdir())
    except OSError:
        return False


def _part(path: Path) -> str | None:
    stem = path.stem.lower()
    if any(re.match(rf"{name}(\W|_|\d|$)", stem) for name in TRAIN):
        return "train"
    return next((name for name in EVALUATION if re.match(rf"{name}(\W|_|\d|$)", stem)), None)


def _together(folder: Path, files: Sequence[Path]) -> Table:
    tables = [read_file(path) for path in files]
    first = tables[0]
    if len(tables) == 1:
        return first
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise DataError(
                f"{table.name} has the columns {', '.join(table.columns)}, and {first.name} has "
                f"{', '.join(first.columns)}: give them the same, or one of them"
            )
    columns = {name: [value for table in tables for value in table.columns[name]] for name in first.columns}
    return Table(f"{len(tables)} files in {folder}", columns, first.class_names, first.remarks)


# -- formats -------------------------------------------------------------------------------------------


def _of_csv(path: Path) -> Table:
    """Read a table of strings: what they mean is decided when all are known."""
    text = _decoded(path)
    tabs = path.suffix.lower() == ".tsv"
    separator, quoting = _dialect(text, tabs)
    first = next(csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting))
    second = next(iter(list(_some_rows(text, separator, quoting))[1:]), None)
    named = _is_header(first, second)
    names = first if named else _names_for(first)
    if len(set(names)) < len(names):
        raise DataError(f"{path} has two columns of one name: {', '.join(names)}")
    options = {
        "sep": separator,
        "quoting": int(quoting),
        "keep_default_na": False,
        "header": 0 if named else None,
        "column_names": names,
        "encoding": "utf-8-sig",
    }
    table = _loaded("csv", path, strings=names, **options)
    remark = f"{path} has no header: its columns are called {', '.join(names)}"
    return table if named else Table(table.name, table.columns, table.class_names, (remark,))


def _names_for(row: Sequence[str]) -> list[str]:
    """Return names for the columns of a table without any: of two, the text is the one that is no number."""
    if len(row) != len(_HEADLESS):
        return [f"column{at + 1}" for at in range(len(row))]
    return [*_HEADLESS] if not _is_number(row[0]) or _is_number(row[1]) else [*_HEADLESS[::-1]]


def _dialect(text: str, tabs: bool) -> tuple[str, Any]:
    """Return the separator, and whether quotes mean anything: in many files with tabs they are characters of texts."""
    line = text.partition("\n")[0]
    if not tabs:
        counts = {separator: line.count(separator) for separator in (",", ";", "\t")}
        separator = "," if counts[","] or not any(counts.values()) else max(counts, key=lambda key: counts[key])
        return separator, csv.QUOTE_MINIMAL
    lines = [line for line in text.splitlines() if line]
    same = len({line.count("\t") for line in lines}) == 1
    fields = [field for line in lines for field in line.split("\t") if '"' in field]
    quoted = bool(fields) and all(re.fullmatch(r'"([^"]|"")*"', field) for field in fields)
    return "\t", csv.QUOTE_NONE if same and not quoted else csv.QUOTE_MINIMAL


def _some_rows(text: str, separator: str, quoting: Any) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting)
    for _, row in zip(range(200), reader, strict=False):
        yield row


def _is_header(first: Sequence[str], second: Sequence[str] | None) -> bool:
    """Return whether a first line names columns: by words that columns have, or by having no number where others do."""
    if any(name.strip().lower() in HEADER_WORDS for name in first) or second is None:
        return True
    numbers = [at for at, value in enumerate(second) if _is_number(value)]
    if any(_is_number(first[at]) for at in numbers if at < len(first)):
        return False
    return bool(numbers) or all(re.fullmatch(r"[\w .-]{1,30}", name.strip()) for name in first)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text) is not None


def _loaded(builder: str, path: Path, strings: Sequence[str] = (), **options: Any) -> Table:
    datasets = import_datasets(str(path))
    if strings:
        options["features"] = datasets.Features({name: datasets.Value("string") for name in strings})
    with _silent(datasets), tempfile.TemporaryDirectory(prefix="trady-") as cache, _reading(path):
        options |= {"split": "train", "cache_dir": cache, "keep_in_memory": True}
        files = {"train": str(path)}
        rows = datasets.load_dataset(builder, data_files=files, **options, **no_code(datasets.load_dataset))
        return _table(datasets, str(path), rows)


def _of_hub(source: str) -> tuple[Table, Table | None]:
    datasets = import_datasets(source)
    name, _, configuration = source.partition(":")
    with _silent(datasets):
        try:
            _look_up(name)
            parts = datasets.load_dataset(name, configuration or None, **no_code(datasets.load_dataset))
        except Exception as error:  # whatever the Hub, the network or the cache answers
            raise DataError(
                f"there is no file or folder {source}, and no data set of that name could be read from the Hugging "
                f"Face Hub: {str(error).splitlines()[0]}"
            ) from error
        train = next((parts[key] for key in TRAIN if key in parts), None)
        if train is None:
            raise DataError(f"{source} has the parts {', '.join(parts)}, and none is called train")
        apart = next((key for key in EVALUATION if key in parts), None)
        evaluation = None if apart is None else _table(datasets, f"{source} ({apart})", parts[apart])
        return _table(datasets, source, train), evaluation


def _look_up(name: str) -> None:
    """Ask the Hub once: the package would try for half a minute where nobody answers."""
    from huggingface_hub import HfApi

    HfApi().dataset_info(name, timeout=10)


def _table(datasets: Any, name: str, rows: Any) -> Table:
    class_names = {}
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            class_names[column] = tuple(inner.names)
    if not len(rows):
        raise DataError(f"{name} has no rows")
    return Table(name, {column: rows[column][:] for column in rows.column_names}, class_names)


def import_datasets(source: str) -> Any:
    """Return the package.

    Raises:
        DataError: It is not installed; ``source`` is what it was needed for.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f'reading {source} needs an extra: pip install "trady[data,transformers]"') from None
    return datasets


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Have the package log nothing and draw no bars: what went wrong is said in our words."""
    logger, bars = logging.getLogger("datasets"), datasets.utils.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except TradyError:
        raise
    except Exception as error:  # whatever the parser of a damaged file raises
        cause = error.__cause__ or error
        if isinstance(lack := in_our_words(cause), ResourceError):
            raise lack from error
        if "corresponds to no data" in str(error):
            raise DataError(f"{path} has no rows") from error
        where = _broken_line(path) if BUILDERS[path.suffix.lower()] == "json" else ""
        said = where or str(cause).strip().splitlines()[0]
        raise DataError(f"{path} cannot be read: {said}") from error


def _broken_line(path: Path) -> str:
    """Say which line of a file is no JSON."""
    lines = read_bytes(path, None).decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            return f"line {number} is no JSON ({error})"
        if not isinstance(found, dict):
            return f'line {number} is a {type(found).__name__}, and a row is an object: {{"text": …}}'
    return ""


def _decoded(path: Path) -> str:
    try:
        return read_bytes(path, None).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. Save it as UTF-8, e.g. "
            f"iconv -f latin1 -t utf-8 {path.name}"
        ) from error
