"""`python -m opd.compare RUN…`: runs side by side. No torch here: it answers in a second, on a machine without it."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from opd.artifacts.comparison import compare, write_comparison
from opd.errors import OpdError


def main() -> None:
    """Print the comparison and write it as md, html and png. Exit 0; 2 where there is nothing to compare."""
    words = _parser().parse_args()
    try:
        comparison = compare(
            words.runs,
            baseline=words.baseline,
            metrics=words.metrics,
            group_by=[key for keys in words.group_by for key in keys],
        )
        folder = words.out or Path("outputs/comparison") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        page = write_comparison(comparison, folder)
    except OpdError as error:
        sys.stderr.write(f"opd: {error}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(f"{comparison.text}\n\n{page}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m opd.compare",
        description="Runs side by side: means over seeds, paired differences, tokens and seconds, plots.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, a multirun folder, or one above"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write; outputs/comparison/<time> if not given"
    )
    parser.add_argument("--baseline", metavar="NAME", help="setting or method to pair with; sft, else the first")
    parser.add_argument("--metrics", type=_names, default=[], metavar="A,B", help="only these, the headline first")
    parser.add_argument(
        "--group-by",
        type=_names,
        action="append",
        default=[],
        metavar="KEY",
        help="config keys that alone tell settings of a method apart, as in method.beta; may be repeated",
    )
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
