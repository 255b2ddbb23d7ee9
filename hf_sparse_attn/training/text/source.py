"""Where text to train on is read from: the standard library, files, folders, and data sets of `datasets`."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_attn.extras import needing
from hf_sparse_attn.shipped.corpus import standard_library_text

if TYPE_CHECKING:
    from hf_sparse_attn.training.text.data import TextSettings

NEEDLES, STANDARD_LIBRARY = "needles", "standard_library"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Text files are read in pieces of so many characters, or up to twice as many to the end of a line.
_PIECE_CHARACTERS = 1 << 20
_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is too long to be held at once.

    Args:
        text: of it.
        begins, ends: whether it is the first and the last part.
        advance: how much of `Texts.total` it is.
    """

    text: str
    begins: bool = True
    ends: bool = True
    advance: int = 1


@dataclass(frozen=True)
class Texts:
    """Pieces in order, and how much they are in all: "B" for bytes of files, "document" for rows; None if unknown."""

    pieces: Iterator[Piece]
    total: int | None
    unit: str


def identity(settings: TextSettings) -> list[Any]:
    """What tells one state of a source from another: its files with sizes and times; for the Hub nothing.

    Raises:
        ValueError, FileNotFoundError: as for `open_texts`.
    """
    if settings.source == STANDARD_LIBRARY:
        return [[name, zlib.crc32(text)] for name, text in _standard_library(settings.split)]
    path = local_path(settings.source)
    if path is None:
        return []
    files = [p for p in path.rglob("*") if p.is_file()] if _is_saved(path) else _files(path, settings.split)
    stats = [(p, p.stat()) for p in sorted(files)]
    return [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]


def shared_text(one: TextSettings, other: TextSettings) -> str | None:
    """A file that two sources share, or the data set that both are; None where they share nothing that can be told.

    Raises:
        ValueError, FileNotFoundError: as for `open_texts`.
    """
    if {one.source, other.source} & {NEEDLES, STANDARD_LIBRARY}:
        return None
    first, second = local_path(one.source), local_path(other.source)
    if first is None or second is None or _is_saved(first) or _is_saved(second):
        same = (one.source, first, one.split, one.name) == (other.source, second, other.split, other.name)
        return one.source if same else None
    own = {file.resolve() for file in _files(first, one.split)}
    return min((str(file) for file in _files(second, other.split) if file.resolve() in own), default=None)


def open_texts(settings: TextSettings) -> Texts:
    """Opens a source of text.

    Raises:
        ValueError: it is nothing that can be read, or has no text in that column.
        FileNotFoundError: it is not there, or it is a folder without text.
        MissingExtra: `datasets` or `pyarrow` is not installed.
    """
    if settings.source == STANDARD_LIBRARY:
        modules = _standard_library(settings.split)
        pieces = (Piece(text.decode("utf-8", "replace"), advance=len(text)) for _, text in modules)
        return Texts(pieces, sum(len(text) for _, text in modules), "B")
    path = local_path(settings.source)
    if path is None or _is_saved(path):
        return _data_set(settings, path)
    files = _files(path, settings.split)
    pieces = (piece for file in files for piece in _READERS[file.suffix](file, settings.column))
    return Texts(pieces, sum(file.stat().st_size for file in files), "B")


def local_path(source: str) -> Path | None:
    """The file or folder that is meant, or None for a data set on the Hub.

    Raises:
        FileNotFoundError: a file is meant, and it is not there.
        ValueError: it can be neither.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix in _READERS or source.startswith((".", "/", "~")) or source.endswith(("/", "\\")):
        raise FileNotFoundError(f"`source` must be a file or folder that is there, got {source!r}")
    if _HUB_ID.fullmatch(source) is None:
        raise ValueError(
            f"`source` must be {NEEDLES!r}, {STANDARD_LIBRARY!r}, a file, a folder or a data set on the Hub, "
            f"got {source!r}"
        )
    return None


def _standard_library(split: str) -> list[tuple[str, bytes]]:
    chosen: Any = split
    return standard_library_text(chosen)


def _is_saved(path: Path) -> bool:
    """Whether `datasets` has saved the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        if split != "train":
            raise ValueError(f"`split` must be 'train' for a file, which has no other, got {split!r} for {path}")
        if path.suffix not in _READERS:
            raise ValueError(f"`source` must end with {_either(_READERS)}, got {path}")
        return [path]
    chosen = path / split
    if not chosen.is_dir():
        if split != "train":
            raise ValueError(f"`split` must be 'train' or the name of a folder in {path}, got {split!r}")
        chosen = path
    files = sorted(p for p in shown_files(chosen) if p.suffix in _READERS)
    if not files:
        raise FileNotFoundError(f"`source` must be a folder with {_either(_READERS)} files, got none in {chosen}")
    return files


def shown_files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones, which systems and editors leave, such as ._name and .checkpoints/."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _either(names: Any) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


def _read_txt(path: Path, column: str) -> Iterator[Piece]:
    # The mark that Windows puts in front of UTF-8 is no text.
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:

        def part() -> str:
            # To the end of the line; but a line may have no end.
            return file.read(_PIECE_CHARACTERS) + file.readline(_PIECE_CHARACTERS)

        text, begins = part(), True
        while text:
            following = part()
            yield Piece(text, begins, not following, len(text.encode()))
            text, begins = following, False


def _read_jsonl(path: Path, column: str) -> Iterator[Piece]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"`source` must hold a JSON object in each line, got line {number} of {path}")
            text = _text(row.get(column), column, list(row), f"line {number} of {path}")
            if text:
                yield Piece(text, advance=len(line))


def _read_parquet(path: Path, column: str) -> Iterator[Piece]:
    with needing("a .parquet file"):
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"`source` must hold Parquet in its .parquet files, got {path}: {error}") from error
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(_no_column(column, names, str(path)))
        share = path.stat().st_size // max(1, file.metadata.num_rows)
        batches = file.iter_batches(_ROWS, columns=[column])
        for row, value in enumerate((value for batch in batches for value in batch.column(0).to_pylist()), 1):
            text = _text(value, column, names, f"row {row} of {path}")
            if text:
                yield Piece(text, advance=share)


_READERS: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _text(value: Any, column: str, columns: list[str], where: str) -> str:
    if isinstance(value, str):
        return value
    if column not in columns:
        raise ValueError(_no_column(column, columns, where))
    if value is None:
        return ""
    raise ValueError(f"`column` {column!r} must hold text, got {type(value).__name__} in {where}")


def _no_column(column: str, columns: list[str], where: str) -> str:
    return f"`column` must be one of {', '.join(map(str, columns)) or 'none'}; got {column!r} for {where}"


def _data_set(settings: TextSettings, path: Path | None) -> Texts:
    with needing(f"the data set {settings.source!r}"):
        import datasets
    found: Any
    if path is not None:
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            if settings.split not in found:
                raise ValueError(f"`split` must be one of {', '.join(found)}; got {settings.split!r} for {path}")
            found = found[settings.split]
        elif settings.split != "train":
            raise ValueError(f"`split` must be 'train' for {path}, which has no other, got {settings.split!r}")
    else:
        streaming = settings.tokens is not None
        try:
            found = datasets.load_dataset(
                settings.source,
                settings.name,
                split=settings.split,
                revision=settings.revision,
                streaming=streaming,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`source` must be a file or folder that is there, or a data set on the Hub with `name` "
                f"{settings.name!r} and `split` {settings.split!r}; got {settings.source!r}: {error}"
            ) from error
    columns = found.column_names
    if columns is not None and settings.column not in columns:
        raise ValueError(_no_column(settings.column, columns, settings.source))
    total = None if isinstance(found, datasets.IterableDataset) else len(found)
    return Texts(_rows(found, settings), total, "document")


def _rows(found: Any, settings: TextSettings) -> Iterator[Piece]:
    # The other columns may be costly to decode.
    for number, row in enumerate(found.select_columns([settings.column])):
        text = _text(row.get(settings.column), settings.column, list(row), f"row {number} of {settings.source}")
        if text:
            yield Piece(text)
