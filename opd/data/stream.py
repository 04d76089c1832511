"""Rows that are read as training reaches them, in memory that does not grow with the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from opd.data.readers import Row
from opd.data.rendering import Rendering, prompt_identity
from opd.protocols import Example
from opd.randomness import generator


@dataclass(frozen=True)
class StreamedRow:
    """A kept row, and what was read to find it, itself included."""

    example: Example
    read: int
    dropped: int
    truncated: int


class StreamedExamples:
    """Row n is the n-th kept row of the shuffled stream, which begins again, in another order, where the data ends.

    Reading goes forward; a smaller number than the last one begins at the head. Every row is a function of the seed and
    its number, so that ranks see one stream and a resumed run finds its place by reading up to it. `length` is how many
    rows the run takes. Rows are shuffled within a buffer: two that are further apart in the data than it is long hardly
    change places. `held_out`: prompts of the evaluation, which are never trained on.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Row | None]],
        rendering: Rendering,
        columns: Mapping[str, str],
        where: str,
        *,
        length: int,
        seed: int,
        buffer: int,
        held_out: frozenset[tuple[Any, ...]] = frozenset(),
    ) -> None:
        self._read, self._rendering, self._columns, self._where = read, rendering, columns, where
        self._length, self._seed, self._buffer, self._held_out = length, seed, buffer, held_out
        self._rows: Iterator[StreamedRow] | None = None
        self._last: StreamedRow | None = None
        self._position = -1  # of the last row

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Example:
        return self.at(row).example

    def at(self, number: int) -> StreamedRow:
        """The row of this number. Raises ConfigError, in one line, for a bad row on the way, or if none is kept."""
        if self._rows is None or number < self._position:
            self._rows, self._last, self._position = self._stream(), None, -1
        while self._last is None or self._position < number:
            self._last, self._position = next(self._rows), self._position + 1
        return self._last

    def _stream(self) -> Iterator[StreamedRow]:
        read = dropped = 0
        for number in itertools.count():
            tally = self._rendering.tally()
            for row in shuffled(self._read(), self._buffer, generator(self._seed, "stream", number)):
                rendered = self._rendering.tried(row, self._columns, self._where, tally)
                tally.note(rendered)
                example, read = rendered.example, read + 1
                if example is None:
                    dropped += 1
                    continue
                if prompt_identity(example) in self._held_out:
                    tally.dropped["held_out"] += 1
                    tally.kept -= 1
                    continue
                yield StreamedRow(example, read, dropped, int(rendered.truncated))
                read = dropped = 0
            if not tally.kept:
                raise self._rendering.nothing_kept(self._where, tally)


def shuffled(rows: Iterable[Row | None], size: int, draw: Generator) -> Iterator[Row]:
    """The rows, each exchanged with one of the `size` that wait."""
    waiting: list[Row] = []
    for row in rows:
        if row is None:
            continue
        if len(waiting) < size:
            waiting.append(row)
            continue
        place = int(draw.integers(size))
        waiting[place], row = row, waiting[place]
        yield row
    yield from (waiting[place] for place in draw.permutation(len(waiting)).tolist())
