"""What the store of artefacts holds, where an artefact comes from, and how to make room.

python -m opd.artifacts [list | show NAME | prune …] [--dir FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opd.artifacts.store import Artifact, Store, folder_bytes
from opd.errors import ConfigError, OpdError


def main() -> None:
    """`python -m opd.artifacts`. Exit 0; 2 for words that cannot be followed; 1 where the disk refuses."""
    asked = _arguments()
    folder = Path(asked.dir or os.environ.get("OPD_ARTIFACTS") or "outputs/artifacts")
    try:
        if folder.exists() != folder.is_dir() or (asked.dir and not folder.exists()):
            raise ConfigError(f"--dir={folder}: not a folder; name the artifacts.dir of the runs")
        text = asked.answer(Store(folder), asked)
    except OpdError as error:
        sys.stderr.write(f"opd: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        sys.exit(f"opd: {error.filename}: {error.strerror}")
    sys.stdout.write(text + "\n")


def _arguments() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--dir", default=argparse.SUPPRESS, help="the store; default: $OPD_ARTIFACTS, else outputs/artifacts"
    )
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="for programs")
    parser = argparse.ArgumentParser(
        prog="python -m opd.artifacts", description="What runs made once and use again.", parents=[common, as_json]
    )
    parser.set_defaults(answer=_list, dir=None, json=False)
    commands = parser.add_subparsers(metavar="{list,show,prune}")

    listing = commands.add_parser("list", parents=[common, as_json], help="everything kept, and its size (the default)")
    listing.set_defaults(answer=_list)

    show = commands.add_parser("show", parents=[common], help="the recipe of one, and what it was made from")
    show.add_argument("name", help="the beginning of its name is enough")
    show.set_defaults(answer=_show)

    prune = commands.add_parser(
        "prune",
        parents=[common],
        help="make room; without --yes it only says what would go",
        description="Conditions narrow each other down. Partial ones go only with --partial, or by name.",
    )
    prune.add_argument("names", nargs="*", metavar="NAME", help="the beginning of a name is enough")
    prune.add_argument("--unused-days", type=_days, metavar="N", help="those that no run used for N days")
    prune.add_argument("--partial", action="store_true", help="those that an interrupted command left, not whole ones")
    prune.add_argument("--kind", help="those of one kind")
    prune.add_argument("--yes", action="store_true", help="remove them")
    prune.set_defaults(answer=_prune)
    return parser.parse_args()


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of days, 0 or more")
    return days


def _list(store: Store, asked: argparse.Namespace) -> str:
    artifacts, total = store.artifacts(), folder_bytes(store.folder)
    if asked.json:
        rows = [_facts(store, artifact) for artifact in artifacts]
        return json.dumps({"folder": str(store.folder), "bytes": total, "artifacts": rows}, indent=2)
    if not artifacts:
        return f"{store.folder}: nothing is kept here yet"
    lines = [("name", "kind", "stage", "size", "made", "last used", "inputs", "")]
    lines += [
        (
            artifact.path.name,
            artifact.kind,
            _stage(artifact) or "—",
            _size(artifact.size_bytes),
            "—" if artifact.partial else _ago(_created(artifact)),
            _ago(artifact.last_used),
            str(len(artifact.inputs)),
            _remains(store, artifact) if artifact.partial else "",
        )
        for artifact in artifacts
    ]
    return "\n".join([*_aligned(lines), f"{_size(total)} in {store.folder}"])


def _facts(store: Store, artifact: Artifact) -> dict[str, Any]:
    return {
        "name": artifact.path.name,
        "kind": artifact.kind,
        "partial": artifact.partial,
        "stage": _stage(artifact),
        "bytes": artifact.size_bytes,
        "created": artifact.label.get("created"),
        "last_used": datetime.fromtimestamp(artifact.last_used, UTC).isoformat(timespec="seconds"),
        "inputs": artifact.inputs,
        "maker": store.maker(artifact.name),
    }


def _show(store: Store, asked: argparse.Namespace) -> str:
    artifacts = store.artifacts()
    artifact = _named(store, artifacts, asked.name)
    label = artifact.label
    if artifact.partial:
        made = _remains(store, artifact)
    else:
        seconds, version = label.get("seconds"), label.get("opd_version")
        made = f"{label.get('created')} ({_ago(_created(artifact))}) in {seconds} s by opd {version}"
    lines = [
        ("folder", str(artifact.path)),
        ("made", made),
        ("command", str(label.get("command"))),
        ("size", _size(artifact.size_bytes)),
        ("last used", _ago(artifact.last_used)),
    ]
    tree = _lineage(artifact.path.name, {entry.path.name: entry for entry in artifacts}, set())
    recipe = json.dumps(label.get("recipe"), indent=2, ensure_ascii=False)
    return "\n".join([*_aligned(lines), "", f"recipe {recipe}", "", "made from", *tree])


def _lineage(name: str, artifacts: dict[str, Artifact], above: set[str]) -> Iterator[str]:
    """An artefact and, indented below it, what it was made from. What was already shown is not unfolded again."""
    artifact = artifacts.get(name)
    if artifact is None:
        place = Path(name)
        here = f"{_size(place.stat().st_size)}" if place.is_file() else _size(folder_bytes(place))
        yield f"{name}  {f'{here}, not of this store' if place.is_absolute() and place.exists() else 'no longer there'}"
        return
    if name in above:
        yield f"{name}  (see above)"
        return
    above.add(name)
    yield f"{name}  {_size(artifact.size_bytes)}"
    for number, child in enumerate(artifact.inputs, start=1):
        last = number == len(artifact.inputs)
        first, *more = _lineage(child, artifacts, above)
        yield f"{'└── ' if last else '├── '}{first}"
        yield from (f"{'    ' if last else '│   '}{line}" for line in more)


def _prune(store: Store, asked: argparse.Namespace) -> str:
    if not (asked.names or asked.partial or asked.kind or asked.unused_days is not None):
        raise ConfigError("prune: says not what to remove; give names, --kind, --unused-days or --partial")
    artifacts = store.artifacts()
    chosen = _chosen(store, artifacts, asked)
    lines, freed, count = [], 0, 0
    for artifact in chosen:
        size, used = artifact.size_bytes, _ago(artifact.last_used)
        maker = store.maker(artifact.name)
        if maker or (asked.yes and not store.remove(artifact)):
            lines.append(f"kept {artifact.path.name}: in the hands of {maker or 'another process'}")
            continue
        freed, count = freed + size, count + 1
        lines.append(
            f"{'removed' if asked.yes else 'would remove'} {artifact.path.name}  {_size(size)}  last used {used}"
        )
        if dependants := _dependants(artifact, artifacts, chosen):
            lines.append(f"  in the lineage of {', '.join(dependants)}: whole without it, and kept")
    if not count:
        return "\n".join([*lines, "nothing to remove"])
    freed_text = f"{_size(freed)} in {count} artefact{'s' * (count > 1)}"
    return "\n".join(
        [*lines, f"freed {freed_text}" if asked.yes else f"would free {freed_text}; nothing is removed without --yes"]
    )


def _chosen(store: Store, artifacts: list[Artifact], asked: argparse.Namespace) -> list[Artifact]:
    if asked.kind and asked.kind not in {artifact.kind for artifact in artifacts}:
        kinds = ", ".join(sorted({artifact.kind for artifact in artifacts})) or "nothing"
        raise ConfigError(f"--kind={asked.kind}: none of that kind in {store.folder}, which holds {kinds}")
    named = [_named(store, artifacts, name) for name in asked.names]
    pool = named or [artifact for artifact in artifacts if artifact.partial == asked.partial]
    once = {artifact.path: artifact for artifact in pool}
    oldest = time.time() - 86400 * (asked.unused_days or 0)
    return [
        artifact
        for artifact in once.values()
        if (not asked.kind or artifact.kind == asked.kind)
        and (artifact.partial or not asked.partial)
        and (asked.unused_days is None or artifact.last_used <= oldest)
    ]


def _named(store: Store, artifacts: list[Artifact], name: str) -> Artifact:
    """The only artefact whose name begins so."""
    found = [artifact for artifact in artifacts if artifact.path.name.startswith(name)]
    exact = [artifact for artifact in found if artifact.path.name == name]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found:
        some = ", ".join(artifact.path.name for artifact in found[:3]) + (", …" if len(found) > 3 else "")
        raise ConfigError(f"{name}: {len(found)} artefacts begin so ({some}); write more of the name")
    raise ConfigError(f"{name}: no artefact of that name in {store.folder}; `list` shows the names")


def _dependants(artifact: Artifact, artifacts: Iterable[Artifact], going: Sequence[Artifact]) -> list[str]:
    """Names of the whole artefacts that were made from it, directly or not, and that stay."""
    names, grown = {artifact.path.name}, True
    while grown:
        more = {other.path.name for other in artifacts if not other.partial and names & set(other.inputs)} - names
        names, grown = names | more, bool(more)
    return sorted(names - {other.path.name for other in going} - {artifact.path.name})


def _stage(artifact: Artifact) -> str:
    """'teacher dpo': the stage and the method that the recipe names, if it does."""
    recipe = artifact.label.get("recipe") or {}
    method = recipe.get("method") or (recipe.get("config") or {}).get("method")
    name = method.get("name") if isinstance(method, dict) else method
    return " ".join(str(word) for word in (recipe.get("stage"), name) if word)


def _remains(store: Store, artifact: Artifact) -> str:
    """What an interrupted maker left, or that it is still at work."""
    steps = [int(place.name.rpartition("-")[2]) for place in artifact.path.glob("checkpoint-*[0-9]") if place.is_dir()]
    files = sum(place.is_file() for place in artifact.path.rglob("*"))
    left = f"checkpoint-{max(steps)}" if steps else f"{files} file{'s' * (files != 1)}"
    maker = store.maker(artifact.name)
    return f"partial: {left}, being made by {maker}" if maker else f"partial: {left} left"


def _created(artifact: Artifact) -> float:
    created = artifact.label.get("created")
    return datetime.fromisoformat(created).timestamp() if created else artifact.path.stat().st_mtime


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _size(size: float) -> str:
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


if __name__ == "__main__":
    main()
