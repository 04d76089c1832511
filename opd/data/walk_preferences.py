"""Preferences among walks, for methods that learn from pairs: which of two good answers is the better one.

"Big moves first" is the task's preference: both answers are shortest walks, so a model can follow it without losing
anything. "Shorter is better" is there to show what goes wrong (docs/walk.md): its answers differ in length, and a
policy that only stops earlier looks preferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opd.data.walk_rules import (
    MAX_PATH,
    UniformSource,
    detour_trace,
    distances,
    is_number,
    legal_moves,
    optimal_moves,
)

DETOURS_OF_LONGER = 0.3  # how often the longer of two answers leaves the shortest way


def boldest(state: int, moves: Sequence[int]) -> int:
    """The move that jumps furthest; of two equal jumps the one to the larger number."""
    return max(moves, key=lambda move: (abs(move - state), move))


def most_timid(state: int, moves: Sequence[int]) -> int:
    """The move that jumps least; of two equal jumps the one to the larger number."""
    return min(moves, key=lambda move: (abs(move - state), -move))


def bold_path(start: int, goal: int) -> list[int]:
    """The shortest walk that takes the boldest of the optimal moves everywhere: "big moves first" prefers it."""
    return _shortest(start, goal, boldest)


def timid_path(start: int, goal: int) -> list[int]:
    """The shortest walk that takes the most timid of the optimal moves everywhere; may be the bold one."""
    return _shortest(start, goal, most_timid)


def _shortest(start: int, goal: int, choose: Callable[[int, Sequence[int]], int]) -> list[int]:
    moves, state, path = optimal_moves(goal), start, []
    while state != goal:
        state = choose(state, moves[state])
        path.append(state)
    return path


def longer_path(start: int, goal: int, rng: UniformSource) -> list[int]:
    """A walk that succeeds too, in more moves than it takes: what "shorter is better" rejects."""
    while True:
        path, _ = detour_trace(start, goal, rng, DETOURS_OF_LONGER)
        if path[-1] == goal and distances(goal)[start] < len(path) <= MAX_PATH:
            return path


def bold_share(start: int, goal: int, text: str) -> float | None:
    """Of the optimal moves that an answer takes where several are optimal, the share that are the boldest there.

    None where it takes no such move. Read up to the goal, the first illegal move or the first piece that is no number;
    whether the answer succeeds does not matter, so read it beside success: an answer that breaks off after one bold
    move has share 1.
    """
    state, bold = start, []
    for piece in text.split(" "):
        if state == goal or not is_number(piece) or int(piece) not in legal_moves(state):
            break
        move, options = int(piece), optimal_moves(goal)[state]
        if len(options) > 1 and move in options:
            bold.append(move == boldest(state, options))
        state = move
    return sum(bold) / len(bold) if bold else None
