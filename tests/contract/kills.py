"""SIGKILL at random steps and in the middle of a save, again and again, until the run ends; against one never killed.

python -m contract.kills [METHOD…]      (in tests/) prints a table
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from contract.command import fingerprint, logged, train_losses, words_of, write_inputs
from contract.variants import DEFAULTS, ROOT, Variant

STEPS, EVERY = 12, 3
_PACE = 0.05  # seconds between looks that are not after a save
_PATIENCE = 300  # seconds for a command


@dataclass(frozen=True)
class Kill:
    """`at`: the last logged step when all processes were killed; `resumed`: the checkpoint this command went on from."""

    at: int
    in_save: bool
    resumed: int


def killed_and_whole(
    variant: Variant, ranks: int, inputs: Path, folder: Path, *more: str, seed: int = 0
) -> tuple[list[Kill], Path, Path]:
    """Three kills at random steps and one in a save, each in the run that continues the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    times = (f"train.max_steps={STEPS}", f"train.save_every_steps={EVERY}", f"hardware.processes_per_node={ranks}")
    whole, broken = folder / "whole", folder / "broken"
    _Command(words_of(variant, inputs, whole, *times, *more), folder / "whole.log").finish()
    draw = random.Random(f"{variant} {ranks} {seed}")
    # Later than the checkpoint that the command before it left, or there would be nothing to continue.
    steps = [draw.randint(EVERY + 1, 2 * EVERY), draw.randint(EVERY + 2, 2 * EVERY + 2), draw.randint(8, STEPS - 2)]
    save = draw.randrange(len(steps) + 1)
    kills = []
    for number, step in enumerate([*steps[:save], None, *steps[save:]]):
        words = words_of(variant, inputs, broken, *times, *more)
        command = _Command(words, folder / f"broken-{number}.log", continues=number > 0)
        in_save = command.kill_in_save(broken, draw.random()) if step is None else command.kill_after(step, broken)
        kills.append(Kill(max((done for done, _ in train_losses(broken)), default=0), in_save, command.resumed or 0))
    last = _Command(words_of(variant, inputs, broken, *times, *more), folder / "last.log").finish()
    assert last.resumed, last.said[-2000:]
    return [*kills, Kill(STEPS, False, last.resumed)], whole, broken


def assert_equal_to_the_bit(whole: Path, broken: Path) -> None:
    """Weights, and every line of metrics.jsonl but for its seconds."""
    lines = [
        [{k: v for k, v in line.items() if "second" not in k} for line in logged(folder)] for folder in (whole, broken)
    ]
    assert lines[0] == lines[1]
    assert [step for step, _ in train_losses(broken)] == list(range(1, STEPS + 1))
    assert fingerprint(broken) == fingerprint(whole)


class _Command:
    def __init__(self, words: list[str], log: Path, *, continues: bool = True) -> None:
        self._log, self._continues = log, continues
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "opd", *words], cwd=ROOT, env=environment, stdout=file, stderr=file
            )
        self._deadline = time.monotonic() + _PATIENCE

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def resumed(self) -> int | None:
        """The step that it says to go on from; None while it has not said so, or for the first command of a run."""
        found = re.search(r"continues the interrupted run in .* from step (\d+)", self.said)
        return int(found[1]) if found else None

    def finish(self) -> _Command:
        assert self._process.wait(_PATIENCE) == 0, self.said[-3000:]
        return self

    def kill_after(self, step: int, folder: Path) -> bool:
        """As soon as metrics.jsonl tells of this step."""
        while not self._has_begun() or max((done for done, _ in train_losses(folder)), default=0) < step:
            self._wait()
        return self._kill(folder, self._everyone())

    def kill_in_save(self, folder: Path, share: float) -> bool:
        """A share of a save's usual time after one has begun, of the first save that is not over by then."""
        while not self._has_begun():
            self._wait(0.0005)
        everyone = None
        while True:
            while not any((folder / ".saving").glob("checkpoint-*/*")):
                self._wait(0.0005)
            # Looking for the processes takes as long as a save: those of the first serve for all.
            everyone = everyone or self._everyone()
            time.sleep(0.003 * share)
            if self._kill(folder, everyone, only_in_save=True):
                return True

    def _has_begun(self) -> bool:
        """Whether what lies in the folder is of this command: it first cuts off what follows the checkpoint."""
        return not self._continues or self.resumed is not None

    def _wait(self, pace: float = _PACE) -> None:
        assert self._process.poll() is None and time.monotonic() < self._deadline, self.said[-3000:]
        time.sleep(pace)

    def _everyone(self) -> list[psutil.Process]:
        command = psutil.Process(self._process.pid)
        return [command, *command.children(recursive=True)]

    def _kill(self, folder: Path, everyone: list[psutil.Process], *, only_in_save: bool = False) -> bool:
        """Every process at once, as a node dies; whether a save was under way."""
        for process in everyone:
            process.suspend()  # nobody tidies up after another's death
        in_save = any((folder / ".saving").glob("checkpoint-*/*"))
        for process in everyone:
            process.resume() if only_in_save and not in_save else process.kill()
        if in_save or not only_in_save:
            psutil.wait_procs(everyone)
            self._process.wait()
        return in_save


def main() -> None:
    """The table."""
    chosen = [variant for variant in DEFAULTS if not sys.argv[1:] or variant.method in sys.argv[1:]]
    print("| method | ranks | killed after step (resumed from) | equal to the bit |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        inputs = write_inputs(Path(temporary))
        for variant in chosen:
            for ranks in (1, 2):
                folder = Path(temporary) / f"{variant}-{ranks}"
                kills, whole, broken = killed_and_whole(variant, ranks, inputs, folder)
                told = ", ".join(
                    f"{kill.at}{' in a save' if kill.in_save else ''} ({after.resumed})"
                    for kill, after in itertools.pairwise(kills)
                )
                assert_equal_to_the_bit(whole, broken)
                print(f"| {variant.method} | {ranks} | {told} | yes |", flush=True)


if __name__ == "__main__":
    main()
