"""What a run reports while it runs: metrics.jsonl, samples.jsonl, the tracker, the progress bar, the evaluations."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from opd import distributed
from opd.artifacts.console import Progress
from opd.artifacts.run_folder import RunFolder
from opd.artifacts.tracking import Tracker
from opd.config import Config
from opd.evaluate import Evaluator, row_scores
from opd.protocols import TokenSequence
from opd.sharding import gathered
from opd.window import Window

if TYPE_CHECKING:  # importing lm-eval takes seconds
    from opd.lm_tasks import LmTasks

log = logging.getLogger("opd")
_RECORDED_ANSWERS = 8  # greedy answers to evaluation prompts, kept before and after
_SHOWN_ANSWERS = 3


class Recorder(TrainerCallback):
    """Hears of every logged step and evaluates between steps. Every rank has one; rank 0 writes."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        *,
        student: Any,
        tokenizer: Any,
        evaluator: Evaluator,
        tasks: LmTasks | None,
        max_steps: int,
    ) -> None:
        self._config, self._folder, self._max_steps = config, folder, max_steps
        self._student, self._tokenizer, self._evaluator, self._tasks = student, tokenizer, evaluator, tasks
        self._writes = distributed.rank() == 0
        self._tracker = Tracker(config, folder.path) if self._writes else None
        self._progress: Progress | None = None

    def evaluate(self, step: int, phase: str, told: Mapping[str, float] | None = None) -> dict[str, float]:
        """Evaluate "before" or "after" training, or as an "evaluation" alone: all is kept, some answers are shown.

        `told`: what else stands in its line of metrics.jsonl.
        """
        with gathered(self._student):
            metrics, samples, scores = self._evaluator(self._student)
            parts = distributed.gather(scores)
            if self._writes and metrics:
                self._write_lines(f"scores-{phase}.jsonl", row_scores(parts))
            if self._tasks is not None:
                tasks, documents = self._tasks(self._student)
                metrics = metrics | tasks
                if self._writes:
                    self._write_lines(f"lm_eval-{phase}.jsonl", documents)
        self._write(step, {**(told or {}), **{f"eval/{name}": value for name, value in metrics.items()}})
        if self._writes and samples:
            for sample in samples[:_RECORDED_ANSWERS]:
                self._folder.append("samples.jsonl", {"step": step, "phase": phase, "origin": "student", **sample})
            answers = [
                f"  {sample['prompt']!r}\n    -> {sample['completion']!r}" for sample in samples[:_SHOWN_ANSWERS]
            ]
            when = "" if phase == "evaluation" else f" {phase} training"
            log.info("Samples%s (greedy):\n%s\n", when, "\n".join(answers))
        return metrics

    def on_step(self, step: int, metrics: dict[str, float], window: Window) -> None:
        """A logged step."""
        if self._progress is not None:
            self._progress.show(step, metrics)
        self._write(step, metrics)
        every = self._config.train.sample_every_steps
        if self._writes and every and step % every == 0:
            for sequence in window.sequences[:_SHOWN_ANSWERS]:
                self._folder.append("samples.jsonl", {"step": step, "phase": "train", **self._sample(sequence)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar where the run continues."""
        self._progress = Progress(self._config.method.name, self._max_steps, state.global_step)

    def end_progress(self) -> None:
        """Leave the bar, so that what is printed next has a line of its own."""
        if self._progress is not None:
            self._progress.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where train.eval_every_steps asks for it; the last step is evaluated as "after"."""
        every, step = self._config.train.eval_every_steps, state.global_step
        if every and step % every == 0 and step < self._max_steps:
            with gathered(self._student):
                metrics = self._evaluator(self._student).metrics
            self._write(step, {f"eval/{name}": value for name, value in metrics.items()})

    def close(self, result: dict[str, Any]) -> None:
        """Hand the result to the tracker."""
        if self._tracker is not None:
            self._tracker.close(result)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        if self._tracker is not None and metrics:
            self._folder.append("metrics.jsonl", {"step": step, **metrics})
            self._tracker.record(step, metrics)

    def _write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        lines = (json.dumps({k: _strict(v) for k, v in record.items()}, default=str) for record in records)
        self._folder.write(name, "".join(f"{line}\n" for line in lines))

    def _sample(self, sequence: TokenSequence) -> dict[str, Any]:
        ids = sequence.completion_ids
        return {
            "prompt": self._tokenizer.decode(sequence.prompt_ids),
            "completion": self._tokenizer.decode(ids[:-1] if sequence.finished else ids),
            "origin": sequence.origin,
            "finished": sequence.finished,
        }


def _strict(value: Any) -> Any:
    """NaN and infinities as strings: JSON has no word for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
