"""Preference pairs in a file, and the words of a command that trains on them."""

from __future__ import annotations

import json
from pathlib import Path

from e2e.model_folders import ROWS, file_run

LORA = "model.student.lora={r:4,alpha:8,dropout:0.0,targets:all-linear}"


def write_pairs(path: Path, num_rows: int = len(ROWS)) -> Path:
    """Questions with the right answer and with one of another length; numbered where they come again."""
    rows = [
        {
            "prompt": question + f" ({n})" * (n >= len(ROWS)),
            "chosen": answer,
            "rejected": f"No idea{' at all' * (n % 3)}, {n}.",
        }
        for n, (question, answer) in enumerate((ROWS * (1 + num_rows // len(ROWS)))[:num_rows])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_run(run_dir: Path, data: Path, student: Path, teacher: Path | None, *more: str) -> list[str]:
    """Two steps of four pairs, at a learning rate that shows in the numbers."""
    steady = ["train.warmup_steps=0", "train.warmup_ratio=0", "train.lr_scheduler=constant"]
    steady += ["train.micro_batch_size=4", "train.learning_rate=1e-3"]
    return file_run(run_dir, data, student, teacher, *steady, *more)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what tells the time."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]
