"""Data sets as the `datasets` library reads them: hub ids, clones of them, and folders that save_to_disk wrote.

What goes wrong in there is told in one line, with the key, the value and what to do.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opd.config import Origin
from opd.data.readers import Row
from opd.errors import ConfigError

_POINTER = b"version https://git-lfs"
_NAMES_OF_SPLITS = re.compile(r"[Aa]vailable splits: \[(.*?)\]|Unknown split \"\w+\". Should be one of \[(.*?)\]")


def dataset_rows(origin: Origin, prefix: str, *, limit: int | None, streaming: bool) -> Iterator[Row]:
    """The first `limit` rows of one split (None: all), each read when it is asked for; numbers count from 1.

    A folder is read where it lies. Of a hub id everything is downloaded and kept in the cache of `datasets`, unless
    `streaming` or a `limit` asks for less. Raises ConfigError, in one line.
    """
    try:
        rows = _opened(origin, prefix, streaming=streaming or limit is not None)
        for number, fields in enumerate(itertools.islice(rows, limit), start=1):
            yield Row(number, dict(fields))
    except ConfigError:
        raise
    except Exception as error:  # its readers, the hub's client and the network raise types of their own
        raise _refusal(origin, prefix, error) from error


def _opened(origin: Origin, prefix: str, *, streaming: bool) -> Iterable[Any]:
    # A run on files need not wait for it.
    from datasets import config, load_dataset, load_from_disk  # noqa: PLC0415

    assert origin.path is not None
    folder = Path(origin.path)
    if not folder.is_dir():
        # Without a network there is only the cache, and nothing in it needs to be streamed.
        streaming = streaming and not config.HF_HUB_OFFLINE
        revision = _commit(origin, prefix, offline=config.HF_HUB_OFFLINE)
        settings: dict[str, Any] = {"revision": revision, "streaming": streaming}
        return load_dataset(origin.path, name=origin.subset, split=origin.split, **settings)  # type: ignore
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(load_from_disk(str(folder)), origin, prefix)
    _check_whole(folder, origin, prefix)
    # Streamed: a copy of every folder in the library's cache would help nobody.
    return load_dataset(str(folder.resolve()), name=origin.subset, split=origin.split, streaming=True)  # type: ignore


def _check_whole(folder: Path, origin: Origin, prefix: str) -> None:
    """Refuse a split of which some files are not there: the library reads the others without a word."""
    pattern = re.compile(rf"{re.escape(origin.split)}-\d+-of-(\d+)\.\w+")
    found = {file.name: match for file in folder.rglob("*-of-*") if (match := pattern.fullmatch(file.name))}
    wanted = max((int(match[1]) for match in found.values()), default=0)
    if len(found) < wanted:
        problem = f"{len(found)} of the {wanted} files of this split are there"
        setting = f"{prefix}path={origin.path} {prefix}split={origin.split}"
        raise ConfigError(f"{setting}: {problem}; download the others, or read one by itself (data=file)")


def _commit(origin: Origin, prefix: str, *, offline: bool) -> str | None:
    """The commit that data.revision names. The library itself takes what is in its cache where it finds no such one."""
    if origin.revision is None:
        return None
    from datasets import load_dataset_builder  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415

    if not offline:
        return HfApi().dataset_info(str(origin.path), revision=origin.revision).sha
    cached = load_dataset_builder(str(origin.path), name=origin.subset).hash
    if cached != origin.revision:
        problem = f"HF_HUB_OFFLINE is set, and the cache holds commit {cached} of {prefix}path={origin.path}"
        raise ConfigError(f"{prefix}revision={origin.revision}: {problem}; set it to that, or unset HF_HUB_OFFLINE")
    return origin.revision


def _saved(data: Any, origin: Origin, prefix: str) -> Iterable[Any]:
    """The split of what save_to_disk wrote: one split, or several by name."""
    splits = dict(data) if isinstance(data, dict) else {str(data.split or origin.split): data}
    if origin.split not in splits:
        raise _no_split(origin, prefix, ", ".join(splits))
    return splits[origin.split]


def _no_split(origin: Origin, prefix: str, known: str) -> ConfigError:
    return ConfigError(
        f"{prefix}split={origin.split}: {prefix}path={origin.path} has no such split; choose from {known}"
    )


def _refusal(origin: Origin, prefix: str, error: Exception) -> ConfigError:
    """One line for what the library says in several."""
    kinds = {kind.__name__ for each in _causes(error) for kind in type(each).__mro__}
    told = textwrap.shorten(" ".join(str(error).split()) or type(error).__name__, 240, placeholder=" …")
    setting, instead = f"{prefix}path={origin.path}", f"set {prefix}path to a folder that holds the data set"
    if found := _NAMES_OF_SPLITS.search(str(error)):
        return _no_split(origin, prefix, (found[1] or found[2]).replace("'", "").replace('"', ""))
    if re.search("BuilderConfig|Config name is missing|cache for .* for config", str(error)):
        return ConfigError(f"{prefix}subset={origin.subset}: {setting} has no such subset ({told}); name one it has")
    if pointer := _pointer(Path(origin.path or "")):
        problem = f"{pointer} is a pointer of git-lfs, not the file"
        return ConfigError(f"{setting}: {problem}; fetch the files (git lfs pull), or download the data set again")
    if kinds & {"EmptyDatasetError", "DataFilesNotFoundError"}:
        return ConfigError(f"{setting}: holds no data files (.parquet .jsonl .json .csv .txt); check the folder or id")
    if "RevisionNotFoundError" in kinds:
        problem = f"{setting} has no such revision"
        return ConfigError(f"{prefix}revision={origin.revision}: {problem}; name a branch, tag or commit it has")
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        return ConfigError(
            f"{setting}: the hub has no such data set, or it is private; check the id, or log in (hf auth)"
        )
    if "OfflineModeIsEnabled" in (*kinds, *re.findall(r"\w+", told)):
        problem = "it is not in the cache, and HF_HUB_OFFLINE is set"
        return ConfigError(f"{setting}: {problem}; unset HF_HUB_OFFLINE, or {instead}")
    if kinds & {"ConnectionError", "TimeoutError", "HTTPError", "TransportError", "ConnectError", "HfHubHTTPError"}:
        problem = f"the hub cannot be reached, or broke off ({told})"
        return ConfigError(f"{setting}: {problem}; check the network and run it again, or {instead}")
    return ConfigError(f"{setting} {prefix}split={origin.split}: cannot be read ({told}); mend it or download it again")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _pointer(folder: Path) -> str | None:
    """A file that git cloned without its content."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size < 1024)
    for file in files if folder.is_dir() else ():
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                return file.relative_to(folder).as_posix()
    return None
