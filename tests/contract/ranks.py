"""Two ranks that train every variant, one after the other, in one pair of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from contract.processes import on_two_ranks
from contract.tiny import Told, some_of_the_step, train
from contract.variants import ALL_VARIANTS, DEFAULTS, VARIANTS, Variant, needs_of, per_micro_batch, tiny_config


def rows_of_the_first_rank(number: int, kind: str) -> bool:
    """Nothing for rank 0 to learn in a first step of 16 prompts."""
    return number < 8


def every_row(number: int, kind: str) -> bool:
    return True


# Every normalisation of a method without teachers; what else is no default is left to the slow tests.
IN_SHORT = [v for v in ALL_VARIANTS if v in DEFAULTS or (v not in VARIANTS and not needs_of(v).teachers)]

# Which sequences come without a loss token -> the variants that are trained so.
CASES: dict[str, tuple[Callable[[int, str], bool], list[Variant]]] = {
    "ragged": (some_of_the_step, IN_SHORT),
    "one_rank_empty": (rows_of_the_first_rank, DEFAULTS),
    "all_empty": (every_row, DEFAULTS),
    "optional": (some_of_the_step, [variant for variant in ALL_VARIANTS if variant not in IN_SHORT]),
}


def train_case(case: str, variant: Variant, world_size: int, folder: Path) -> Told:
    """One step of the variant; micro-batches are small, so that they differ on one rank and on two."""
    ranks = {"processes_per_node": world_size}
    config = tiny_config(variant, train=per_micro_batch(variant, 3), hardware=ranks, run={"dir": str(folder)})
    return train(config, empties=CASES[case][0])


def train_on_two_ranks(folder: Path, cases: Sequence[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(case, variant): what each rank tells}."""
    return on_two_ranks(
        {(case, str(variant)): partial(_told, case, variant) for case in cases for variant in CASES[case][1]}, folder
    )


def _told(case: str, variant: Variant, world_size: int, folder: Path) -> dict[str, Any]:
    one = train_case(case, variant, world_size, folder)
    return {
        "named": one.named[0],
        "gradient": one.gradients[0],
        "rollouts": one.rollouts,
        "weights": one.student.state_dict(),
    }
