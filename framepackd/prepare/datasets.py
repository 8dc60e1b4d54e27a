"""Reads data sets of Hugging Face's ``datasets`` as items, and writes prepared items as a data set.

The columns are those of FramePack's data scripts: first_frame, last_frame, text and frame_diff, or frame_0,
frame_1 ... with diff_0_1 ...; an image column alone works too.
"""

import errno
import math
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from framepack_core.errors import RequestError
from framepack_core.media import heif
from framepack_core.media import pictures as media
from framepack_core.media.pictures import Picture
from framepackd.inbox.naming import PICTURES, group_files
from framepackd.prepare.items import Item, ItemStream, Options, UsageError, endings_of, safe_name
from framepackd.prepare.video_frames import SUFFIXES

TEXT_COLUMNS = ("text", "caption", "prompt")
NAME_COLUMNS = ("name", "file_name", "__key__")
ROWS_AT_ONCE = 16  # in memory while a data set is written; a row has megabytes
SHARD = "200MB"  # the size of a data set's files, and about the memory that writing takes
BUFFER_BYTES = 1 << 20
HUB_FILE = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}\Z")


def library() -> Any:
    """Import the library, which is an extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"data sets need the library datasets ({error}): pip install 'framepackd[datasets]'"
        ) from error
    datasets.disable_progress_bars()  # we draw our own
    datasets.config.TORCH_AVAILABLE = False  # else it would load torch for nothing
    return datasets


def is_one(path: Path) -> bool:
    """Say whether a path is a data set."""
    return bool(_saved(path) or _parquet_files(path))


def _saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    # macOS leaves a hidden file next to each.
    visible = (each for each in path.rglob("*") if not each.name.startswith("."))
    return sorted(each for each in visible if each.suffix.lower() == ".parquet")


def read(options: Options) -> ItemStream:
    """Find the rows of a data set.

    Raises:
        UsageError: it cannot be read, or has no columns for a job.
    """
    try:
        rows = (_Saved if _saved(options.source) else _Parquet)(options)
    except (OSError, ValueError) as error:
        raise UsageError(f"{options.source} cannot be read as a data set: {error}") from error
    pictures = _picture_columns(rows.columns)
    if not pictures:
        raise UsageError(
            f"{options.source} has the columns {', '.join(rows.columns)}: there must be first_frame and "
            "last_frame, or frame_0, frame_1 ..., or image"
        )
    endings = endings_of(len(pictures), chain=pictures[0] == "frame_0")
    table = _Table(options, pictures, _difference_columns(pictures), endings)
    wanted = {*pictures, *table.differences, *TEXT_COLUMNS, *NAME_COLUMNS}
    return ItemStream(
        rows.total, endings, table.items(rows.read([name for name in rows.columns if name in wanted]))
    )


class _Saved:
    """A data set that ``save_to_disk`` wrote."""

    def __init__(self, options: Options) -> None:
        self._image = library().Image
        found = library().load_from_disk(str(options.source))
        if isinstance(found, dict):
            found = found[_choose_split(options, list(found))]
        elif options.split is not None:
            raise UsageError(f"{options.source} has no splits: leave out --split")
        self._found = found
        self.columns: list[str] = found.column_names
        self.total = len(found)

    def read(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        rows = self._found.select_columns(columns)
        for column, feature in rows.features.items():
            if isinstance(feature, self._image):
                rows = rows.cast_column(column, self._image(decode=False))
        return iter(rows)


class _Parquet:
    """Parquet files, one row group in memory: the library would copy them to a cache, or read far ahead."""

    def __init__(self, options: Options) -> None:
        library()
        from pyarrow.parquet import ParquetFile

        paths = _parquet_files(options.source)
        matches = {path: HUB_FILE.match(path.stem) for path in paths}
        splits = {path: match["split"] if match else path.stem for path, match in matches.items()}
        if all(matches.values()) or set(splits.values()) <= {"train", "test", "validation"}:
            split = _choose_split(options, sorted(set(splits.values())))
            paths = [path for path in paths if splits[path] == split]
        elif options.split is not None:
            raise UsageError(f"{options.source} has no splits: leave out --split")
        self._files = [ParquetFile(path, buffer_size=BUFFER_BYTES) for path in paths]
        self.columns: list[str] = self._files[0].schema_arrow.names
        self.total = sum(file.metadata.num_rows for file in self._files)

    def read(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        for file in self._files:
            for group in range(file.num_row_groups):  # given several, it would keep them all
                for batch in file.iter_batches(1, row_groups=[group], columns=columns, use_threads=False):
                    yield from batch.to_pylist()


def _choose_split(options: Options, splits: list[str]) -> str:
    if options.split is None and len(splits) == 1:
        return splits[0]
    if options.split not in splits:
        got = f", got {options.split!r}" if options.split else ""
        raise UsageError(
            f"{options.source} has the splits {', '.join(splits)}: --split must be one of them{got}"
        )
    return options.split


def _picture_columns(columns: list[str]) -> list[str]:
    chain = [f"frame_{number}" for number in range(len(columns))]
    chain = chain[: next((number for number, name in enumerate(chain) if name not in columns), len(chain))]
    if {"first_frame", "last_frame"} <= set(columns):
        return ["first_frame", "last_frame"]
    return chain if len(chain) > 1 else ["image"] if "image" in columns else []


def _difference_columns(pictures: list[str]) -> list[str]:
    """Name the columns for the differences of neighbours.

    >>> _difference_columns(["frame_0", "frame_1", "frame_2"])
    ['diff_0_1', 'diff_1_2']
    """
    if pictures[0] == "first_frame":
        return ["frame_diff"]
    return [f"diff_{number}_{number + 1}" for number in range(len(pictures) - 1)]


@dataclass(frozen=True)
class _Table:
    """Turns rows into items."""

    options: Options
    pictures: list[str]
    differences: list[str]
    endings: tuple[str, ...]

    def items(self, rows: Iterable[dict[str, Any]]) -> Iterator[Item]:
        prefix = safe_name(self.options.source.resolve().stem)
        seen: set[str] = set()
        for number, row in enumerate(_readable(rows)):
            name = self._name(row) or f"{prefix}_{number:06}"
            if name.casefold() in seen:
                name = safe_name(f"{name}_{number:06}")
            seen.add(name.casefold())
            yield Item(
                origin=f"row {number}",
                folder="",
                name=name,
                endings=self.endings,
                pictures=partial(self._read_pictures, row),
                text=partial(self._text, row),
                differences=self._recorded(row),
            )

    def _name(self, row: dict[str, Any]) -> str | None:
        """Find the name of a row, in a column or as the file name of its first picture."""
        found = next((row[column] for column in NAME_COLUMNS if isinstance(row.get(column), str)), None)
        if found is None:
            _, path = _stored(row[self.pictures[0]])
            found = group_files([PurePosixPath(path).name])[0].name if path else None
        name = PurePosixPath((found or "").replace("\0", "")).name.lstrip(".")
        if name.lower().endswith((*PICTURES, *heif.ENDINGS, *SUFFIXES)):
            name = PurePosixPath(name).stem
        return safe_name(name) if name else None

    def _text(self, row: dict[str, Any]) -> str:
        if self.options.prompt is not None:
            return self.options.prompt
        text = next((row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str)), "")
        if not text.strip():
            raise RequestError(f"has no {' or '.join(TEXT_COLUMNS)}: give one --prompt for all")
        return text.replace("\r\n", "\n").strip()

    def _recorded(self, row: dict[str, Any]) -> tuple[float, ...] | None:
        """Give the recorded differences of a row; None if it does not have all of them."""
        values = [row.get(column) for column in self.differences]
        known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
        return tuple(known) if len(known) == len(values) else None

    def _read_pictures(self, row: dict[str, Any]) -> Iterator[Picture]:
        for column in self.pictures:
            content, path = _stored(row[column])
            if not content and not path:
                raise RequestError(f"has no {column}: leave the row out, or fill it")
            if not content and not Path(path).is_file():
                raise RequestError(f"{column} is {path}, which is not a file on this machine")
            with tempfile.TemporaryDirectory(prefix="framepackd-") as folder:
                file = Path(folder) / column if content else Path(path)
                if content:
                    file.write_bytes(content)
                yield media.open_picture(file)


def _stored(value: object) -> tuple[bytes, str]:
    """Give the content and the path of a picture in a row; what is missing is empty."""
    if isinstance(value, dict):
        return value.get("bytes") or b"", value.get("path") or ""
    return value if isinstance(value, bytes) else b"", value if isinstance(value, str) else ""


def _readable(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except ValueError as error:  # so are pyarrow's
        raise OSError(errno.EIO, f"cannot be read further ({error})", "the data set") from error


class Writer:
    """Collects prepared items as a data set, in a file; only a few rows are in memory."""

    def __init__(self, endings: tuple[str, ...], folder: Path) -> None:
        """Begin in an empty ``folder``, which the caller removes afterwards.

        Raises:
            UsageError: the library is not installed.
        """
        datasets = library()
        from datasets.arrow_writer import ArrowWriter

        self._pictures = [ending.strip("_").removesuffix(".png") or "image" for ending in endings]
        self._differences = _difference_columns(self._pictures)
        features = datasets.Features(
            dict.fromkeys(self._pictures, datasets.Image())
            | {"text": datasets.Value("string")}
            | dict.fromkeys(self._differences, datasets.Value("float64"))
        )
        self._folder = folder
        self._file = folder / "rows.arrow"
        self._rows = ArrowWriter(path=str(self._file), features=features, writer_batch_size=ROWS_AT_ONCE)
        self.count = 0

    def add(self, pictures: list[Path], text: str, differences: tuple[float, ...]) -> None:
        """Add a row."""
        row: dict[str, Any] = {
            column: {"bytes": path.read_bytes(), "path": path.name}
            for column, path in zip(self._pictures, pictures, strict=True)
        }
        row |= {"text": text, **dict(zip(self._differences, differences, strict=True))}
        self._rows.write(row)
        self.count += 1

    def finish(self) -> Any:
        """Give the data set."""
        self._rows.finalize()
        return library().Dataset.from_file(str(self._file))

    def save(self, rows: Any, folder: Path) -> None:
        """Save a data set; its folder gets its name when it is complete."""
        part = self._folder / "saved"
        rows.save_to_disk(str(part), max_shard_size=SHARD)
        part.rename(folder)

    def push(self, rows: Any, repository: str, *, private: bool) -> None:
        """Push a data set to the hub, with the user's token."""
        rows.push_to_hub(repository, private=private, max_shard_size=SHARD)


def check_push(repository: str) -> None:
    """Check that a data set could be pushed, before all the work.

    Raises:
        UsageError: there is no token, or the name is not ORG/NAME.
    """
    library()
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise UsageError(f"--push needs ORG/NAME, got {repository!r}")
    if get_token() is None:
        raise UsageError("--push needs your token of the hub: run hf auth login, or set HF_TOKEN")
