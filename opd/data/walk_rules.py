"""The embedded task, a number walk: from one number to another by legal moves, "25 to 22" -> "26 16 32 22".

Numbers are 10..99; the legal moves from s are s+1, s-1, 2s and s-10 where they stay in that range. The user
names start and goal, the assistant writes the numbers visited after the start. A legal but poor move can be
recovered from, so states off the demonstrations matter: that is what on-policy distillation is about. The
task is finite and solved by breadth-first search: it shows how distillation behaves, not how a model reasons.

Evaluation and training share no (start, goal) prompt. They do share states: an evaluation pair occurs as
(state, goal) in the middle of training walks.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Protocol

NUMBERS = range(10, 100)
MIN_DISTANCE, MAX_DISTANCE = 2, 9  # moves between start and goal of every prompt
MAX_PATH = 12  # numbers a successful answer may have
MAX_TRACE = 16  # numbers at which a detour trace of the corpus is cut
NUM_EVALUATION_PAIRS = 512
REFERENCE_SEED = 7

Pair = tuple[int, int]


class UniformSource(Protocol):
    """What a walk draws from: random.Random and numpy's Generator both are one."""

    def random(self) -> float: ...


@cache
def legal_moves(state: int) -> tuple[int, ...]:
    """The numbers one move away from `state`, ascending, never `state` itself; at least two everywhere."""
    targets = {state + 1, state - 1, 2 * state, state - 10} - {state}
    return tuple(sorted(target for target in targets if target in NUMBERS))


@cache
def distances(goal: int) -> tuple[int, ...]:
    """Fewest moves to `goal`, indexed by the number one is at. Entries 0..9 are no states and hold -1."""
    predecessors: dict[int, list[int]] = {number: [] for number in NUMBERS}
    for state in NUMBERS:
        for target in legal_moves(state):
            predecessors[target].append(state)
    found = [-1] * NUMBERS.stop
    found[goal] = 0
    queue = deque([goal])
    while queue:
        target = queue.popleft()
        for state in predecessors[target]:
            if found[state] < 0:
                found[state] = found[target] + 1
                queue.append(state)
    return tuple(found)


@cache
def optimal_moves(goal: int) -> tuple[tuple[int, ...], ...]:
    """The moves that come one nearer to `goal`, indexed by the number one is at; none at the goal."""
    distance = distances(goal)
    return tuple(
        tuple(move for move in legal_moves(state) if distance[move] < distance[state]) if state in NUMBERS else ()
        for state in range(NUMBERS.stop)
    )


@cache
def _shuffled_pairs() -> tuple[Pair, ...]:
    pairs = [
        (start, goal) for start in NUMBERS for goal in NUMBERS if MIN_DISTANCE <= distances(goal)[start] <= MAX_DISTANCE
    ]
    random.Random(0).shuffle(pairs)
    return tuple(pairs)


@cache
def evaluation_pairs() -> tuple[Pair, ...]:
    """The 512 (start, goal) pairs held out for evaluation, always in the same order."""
    return _shuffled_pairs()[:NUM_EVALUATION_PAIRS]


@cache
def training_pairs() -> tuple[Pair, ...]:
    """The other 6941 (start, goal) pairs, always in the same order."""
    return _shuffled_pairs()[NUM_EVALUATION_PAIRS:]


def pick(options: Sequence[int], rng: UniformSource) -> int:
    """One of the options, uniformly."""
    return options[int(rng.random() * len(options))]


def optimal_path(start: int, goal: int, rng: UniformSource) -> list[int]:
    """A shortest walk (the numbers after `start`), each move uniform among the optimal ones there."""
    moves, state, path = optimal_moves(goal), start, []
    while state != goal:
        state = pick(moves[state], rng)
        path.append(state)
    return path


def detour_trace(start: int, goal: int, rng: UniformSource, probability: float) -> tuple[list[int], list[bool]]:
    """A walk, and whether each of its numbers is a detour: drawn from all legal moves, good or bad.

    Each move is a detour with `probability`, else uniform among the optimal ones. Training leaves detours out
    of the loss but not what follows them: the model learns to come back, not to wander. Cut at 16 numbers, so
    the walk may not have reached the goal; then it must not be given an end token.
    """
    moves, state = optimal_moves(goal), start
    path: list[int] = []
    is_detour: list[bool] = []
    while state != goal and len(path) < MAX_TRACE:
        wander = rng.random() < probability
        state = pick(legal_moves(state) if wander else moves[state], rng)
        path.append(state)
        is_detour.append(wander)
    return path, is_detour


def render_prompt(start: int, goal: int, hint: Sequence[int] = ()) -> str:
    """What the user says; with a hint, a solution follows on a second line: "25 to 22\\nhint: 24 23 22"."""
    question = f"{start} to {goal}"
    return f"{question}\nhint: {render_path(hint)}" if hint else question


def render_path(path: Sequence[int]) -> str:
    """What the assistant answers, without the end token."""
    return " ".join(map(str, path))


def score(start: int, goal: int, text: str, finished: bool, prefix: str = "") -> dict[str, float]:
    """{"success", "optimal"} of an answer, each 0.0 or 1.0.

    Success: numbers separated by single spaces, every move legal, the last the goal, at most 12 numbers, and
    the end token emitted (`finished`). Optimal: success in the fewest moves.

    `prefix` is an answer's beginning that was forced on the model; `text` then continues it, with its own
    leading space (decode must not strip it). The forced numbers count towards the 12 and must be legal too;
    optimal then means the fewest moves from where the prefix ends, since the detour is not the model's doing.
    """
    path = _parse_path(prefix + text)
    success = finished and path is not None and len(path) <= MAX_PATH and _leads(start, path, goal)
    forced = _parse_path(prefix) or []
    fewest = len(forced) + distances(goal)[forced[-1] if forced else start]
    return {"success": float(success), "optimal": float(success and path is not None and len(path) == fewest)}


def _parse_path(text: str) -> list[int] | None:
    """The numbers of an answer; None unless it is two-digit numbers between single spaces."""
    pieces = text.split(" ")
    return [int(piece) for piece in pieces] if all(map(is_number, pieces)) else None


def is_number(piece: str) -> bool:
    """Whether this is a number as an answer must write it."""
    return re.fullmatch("[1-9][0-9]", piece) is not None  # int() also takes "+26", "2_6", "２６"


def _leads(start: int, path: list[int], goal: int) -> bool:
    legal = all(move in legal_moves(state) for state, move in zip([start, *path], path, strict=False))
    return legal and path[-1] == goal
