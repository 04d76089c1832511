"""Several sources in fixed shares: the largest mixture of them that repeats no row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from opd.config import MixedOrigin
from opd.data.files import FileExamples, num_duplicates
from opd.data.origins import columns_of, name_of, rows_of
from opd.data.rendering import Rendering
from opd.errors import ConfigError
from opd.protocols import Example
from opd.randomness import permutation


def mix(sources: Mapping[str, MixedOrigin], rendering: Rendering, *, limit: int | None, seed: int) -> FileExamples:
    """Rows of all sources in one order, in which w_i of them come from source i.

    n_i = floor(w_i · M), where w_i = weight_i / Σ weights and M = min rows_i / w_i over the rows that are kept, or
    `limit` where that is less: then no source is read further than its share needs. Which rows of a source with more
    are taken, and the order, are the seed's. Example.row is the row's place in the mixture, from 1; fields "source" and
    "source_row" say whence it is. Raises ConfigError, in one line, for what is wrong with a source, or if the
    shares leave one without a row.
    """
    names = sorted(sources)
    total = sum(Fraction(str(sources[name].weight)) for name in names)
    shares = {name: Fraction(str(sources[name].weight)) / total for name in names}
    tally, read, told = rendering.tally(), {}, {}
    for name in names:
        read[name], counts = _kept(sources[name], name, rendering, limit and math.floor(shares[name] * limit))
        tally.add(counts)
        told[name] = counts.summary()
    size = min(len(read[name]) / shares[name] for name in names)
    size = size if limit is None else min(size, Fraction(limit))
    mixed: list[Example] = []
    for name in names:
        number = math.floor(shares[name] * size)
        if number == 0:
            problem = f"its share of {math.floor(size)} rows is less than one"
            raise ConfigError(
                f"data.sources.{name}.weight={sources[name].weight}: {problem}; raise it, or leave it out"
            )
        chosen = permutation(len(read[name]), seed, f"mixture of {name}")[:number]
        mixed += [read[name][row] for row in sorted(chosen.tolist())]
        told[name] |= {"used": number, "left_out": len(read[name]) - number}
    order = permutation(len(mixed), seed, "mixture").tolist()
    examples = [replace(mixed[row], row=place) for place, row in enumerate(order, start=1)]
    summary = {**tally.summary(), "kept": len(examples), "duplicates": num_duplicates(examples), "sources": told}
    return FileExamples(examples, summary)


def _kept(origin: MixedOrigin, name: str, rendering: Rendering, wanted: int | None) -> tuple[list[Example], Any]:
    """The source's rows that are kept, the first `wanted` of them (None: all), and what became of the others."""
    prefix, tally, kept = f"data.sources.{name}.", rendering.tally(), []
    where = name_of(origin, prefix)
    rows = rows_of(origin, prefix, streaming=wanted is not None)
    try:
        for example in rendering.examples(rows, columns_of(origin), where, tally):
            kept.append(replace(example, fields={**example.fields, "source": name, "source_row": example.row}))
            if wanted is not None and len(kept) >= wanted:
                break
        if not kept:
            raise rendering.nothing_kept(where, tally)
    except ConfigError as error:  # each source names its own columns
        raise ConfigError(str(error).replace("data.columns", f"{prefix}columns")) from None
    return kept, tally
