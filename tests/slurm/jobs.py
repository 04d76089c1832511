"""Jobs for the tests' Slurm: launchers/slurm/train.sbatch with a run of two tiny models on CPU ranks."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.commands import ENVIRONMENT, words_of

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "launchers" / "slurm" / "train.sbatch"


class Jobs:
    """Submits gkd from a folder of its own, by the template."""

    def __init__(self, slurm, folder: Path, student: Path, teacher: Path, rows: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self._models = (student, teacher, rows)
        # `python` is what runs the tests, whatever is on the path of the node.
        self._env = {
            **{name: ENVIRONMENT[name] for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONPATH")},
            "PATH": f"{Path(sys.executable).parent}:{slurm.env['PATH']}",
            "MODEL_NAME": str(student),
            "BATCH_SIZE": "4",
            "MAX_STEPS": "2",
            "HARDWARE": "cpu_2rank",
        }

    def words(self, run: Path, *more: str) -> list[str]:
        """The words of the same run as one command on this machine."""
        return ["experiment=dpo_gpt2", "method=gkd", "method.beta=0.1", *words_of(run, *self._models, *more)]

    def submit(self, name: str, *options: str, more: tuple[str, ...] = (), **env: str) -> str:
        """The job of a run in this folder's `name`, what it says in `name`.out."""
        # The template has said these, and takes the rest.
        said = ("experiment=", "method.beta=", "run.dir=", "model/student=", "model.student.path=", "train.batch_size=")
        said += ("train.max_steps=",)
        words = [word for word in self.words(Path(name), *more) if not word.startswith(said)]
        sbatch = ("--gpus-per-node=0", "--cpus-per-task=2", "--nodes=2", f"--output={name}.out", *options)
        return self.slurm.submit(*sbatch, TEMPLATE, *words, cwd=self.folder, **{**self._env, "OUTPUT_DIR": name, **env})

    def said(self, name: str) -> str:
        """What the job has printed."""
        return (self.folder / f"{name}.out").read_text(errors="replace")
