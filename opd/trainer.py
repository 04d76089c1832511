"""The engine: one subclass of transformers.Trainer that trains every method.

It knows a method by what it needs and by the sums it returns, never by name. Per optimizer step: a window (rows,
rollouts, counts over all ranks), then per micro-batch one forward of the wrapped student, head and loss inside it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from opd import distributed, zero
from opd.artifacts.run_folder import SPENT, ranks_of
from opd.config import Config
from opd.errors import RunError
from opd.model_loading import device_of
from opd.models import attach_objective, causal_lm, computing, evaluation_mode, read_head, within_forward
from opd.objectives import token_logprobs
from opd.protocols import Dense, ExampleSet, Layout, Method, Terms
from opd.sharded_checkpoint import load_optimizer, load_weights, save_shards
from opd.sharding import gathered, is_sharded, local, whole, whole_state
from opd.sources import SequenceSource
from opd.teachers import Teacher, ask_teachers
from opd.tokenizers import Vocabulary
from opd.training_arguments import training_arguments
from opd.window import Window, WindowBuilder

log = logging.getLogger("opd")
_UNLOGGED = "unlogged-rank{}.json"  # in a checkpoint between two logged steps
_SCHEDULE = "scheduler.pt"
_LEDGER = ("student_trained_tokens", "student_sampled_tokens", "teacher_sampled_tokens", "teacher_scored_tokens")


class DistillationTrainer(Trainer):
    """Trains `model` by `method`. `on_step(step, metrics, window)` hears of every logged step, on every rank."""

    loss_is_scaled_for_ga = True  # a micro-batch's loss is its share of the step's: nothing is left to divide

    def __init__(
        self,
        config: Config,
        model: Any,
        method: Method,
        *,
        tokenizer: Any,
        examples: ExampleSet,
        source: SequenceSource,
        teachers: Mapping[str, Teacher],
        vocabulary: Vocabulary,
        max_steps: int,
        on_step: Callable[[int, dict[str, float], Window], None],
        callbacks: list[TrainerCallback] | None = None,
        started: float | None = None,
    ) -> None:
        """`started`: when the run began, by time.perf_counter(); None: now."""
        self.config, self.method, self.teachers, self.vocabulary = config, method, teachers, vocabulary
        self._on_step, self._metrics, self._maxima = on_step, {}, {}
        self._staging: Path | None = None
        self._unlogged: dict[str, Any] = {}
        self.step_started = self.step_seconds = 0.0
        self.earlier_seconds = 0.0  # from the beginning to the checkpoint that is taken up, evaluations too
        self._started = time.perf_counter() if started is None else started
        self.spent: dict[str, Any] = {"train_seconds": 0.0, "tokens": 0}  # by all sessions; without evaluating, saving
        self.spent["ledger"] = dict.fromkeys(_LEDGER, 0)
        attach_objective(model)
        self.windows = WindowBuilder(
            config,
            method,
            examples=examples,
            source=source,
            teachers=teachers,
            vocabulary=vocabulary,
            device=device_of(config),
            student_logprobs=self._student_logprobs,
        )
        tickets = list(range(max_steps * self.windows.num_micro_batches * distributed.world_size()))
        super().__init__(
            model,
            training_arguments(
                config,
                max_steps=max_steps,
                num_micro_batches=self.windows.num_micro_batches,
                num_rows=len(examples),
            ),
            train_dataset=tickets,  # type: ignore[arg-type]
            data_collator=_ticket,
            processing_class=tokenizer,
            callbacks=[_StepKeeper(self), *(callbacks or [])],
        )
        self._in_shards = is_sharded(model)  # FSDP2; ZeRO begins with the training
        if self._in_shards:  # autocast is all that accelerate has to add
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def resume(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if there is one."""
        if checkpoint is not None:
            saved = json.loads((checkpoint / SPENT).read_text(encoding="utf-8"))
            self.spent = {name: saved[name] for name in self.spent}
            self.earlier_seconds = saved.get("seconds", 0.0)
            self.windows.load(checkpoint)
            self._read_unlogged(checkpoint)
            for teacher in _each(self.teachers):
                teacher.load(checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self._refuse_non_finite_weights()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The window of the step that comes next. The data loader only counts; rows are addressed by step."""
        for _ in range(num_batches):
            next(epoch_iterator)
        self.step_started = time.perf_counter()
        with computing(self.config.hardware), gathered(self.model) if self.windows.samples_next else nullcontext():
            self.window = self.windows(self.state.global_step)
        self._keep_ledger(self.window)
        for name, pair in self.window.metrics.items():
            self._add(name, *pair)  # every rank holds the sums of all: their ratio is the same
        if len(self.window.batches) != num_batches:
            raise RunError(
                f"step {self.state.global_step}: {len(self.window.batches)} micro-batches, not {num_batches}"
            )
        return [{"batch": batch} for batch in self.window.batches], None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As Trainer's; but a step without a loss token goes no further than its metrics where it could not be skipped.

        DeepSpeed's backward pass ends in its optimizer's step, momentum and weight decay included.
        """
        if self.is_deepspeed_enabled and self.window.counts["loss_tokens"] == 0:
            with torch.no_grad():
                return self.compute_loss(model, inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of ranks that the reducer averages over."""
        batch = inputs["batch"]
        scores = ask_teachers(self.method.needs, self.teachers, batch)
        inner = causal_lm(model)

        def objective(hidden: Tensor) -> tuple[Tensor, Terms]:
            terms = self.method.loss(Dense(hidden, read_head(inner, self.vocabulary.size)), scores, batch)
            return share_of_step(terms, self.window.counts) * distributed.world_size(), terms

        loss, terms = model(layout=batch.layout, objective=objective)
        self._note(terms)
        if not math.isfinite(share := float(loss.detach()) / distributed.world_size()):
            raise self._diverged(f"step {self.state.global_step + 1}: the loss is {share}")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A logged step under opd's names; metrics are over all steps since the last. Trainer's summary is left out."""
        if "loss" not in logs:
            return
        window, step = self.window, self.state.global_step
        record = {
            "train/loss": logs["loss"],
            # Of a skipped step DeepSpeed tells the norm of the last one that it made.
            "train/grad_norm": logs["grad_norm"] if window.counts["loss_tokens"] else 0.0,
            "train/lr": logs["learning_rate"],
            "train/tokens": window.counts["loss_tokens"],
            **self._reduced_metrics(),
            "seconds_per_step": self.step_seconds,
            "tokens_per_second": window.counts["loss_tokens"] / self.step_seconds,
        }
        self.state.log_history.append({"step": step, **record})
        self._on_step(step, record, window)

    def _keep_ledger(self, window: Window) -> None:
        """Tokens of completions by what was done to them: the budget that methods are compared under."""
        needs, counts, ledger = self.method.needs, window.counts, self.spent["ledger"]
        self.spent["tokens"] += int(counts["loss_tokens"])
        ledger["student_trained_tokens"] += int(counts["loss_tokens"])
        ledger["student_sampled_tokens"] += window.sampled["student"] + window.sampled["mixture"]
        ledger["teacher_sampled_tokens"] += window.sampled["teacher"] + window.sampled["mixture"]
        for name, need in needs.teachers.items():
            asked = sum(counts[f"{kind}_loss_tokens"] for kind in need.kinds or needs.sequences)
            times = needs.window + (need.scores != "logprobs" or not needs.window)
            ledger["teacher_scored_tokens"] += 0 if self.teachers[name].is_kept else int(times * asked)

    def _add(self, name: str, numerator: float, denominator: float) -> None:
        sums = self._metrics.setdefault(name, [0.0, 0.0])
        sums[0] += numerator
        sums[1] += denominator

    def _note(self, terms: Terms) -> None:
        for name, (numerator, denominator) in terms.metrics.items():
            self._add(f"train/{name}", float(numerator), float(denominator))
        for name, values in terms.maxima.items():
            top = float(values.max()) if len(values) else -math.inf
            self._maxima[name] = max(self._maxima.get(name, -math.inf), top)

    def _reduced_metrics(self) -> dict[str, float]:
        """Σ numerator / Σ denominator over the micro-batches since the last log and all ranks."""
        names = sorted(self._metrics)
        sums = distributed.total(torch.tensor([self._metrics[name] for name in names], dtype=torch.float64))
        reduced = {name: float(pair[0] / pair[1]) for name, pair in zip(names, sums, strict=True) if pair[1]}
        for name in sorted(self._maxima):
            if math.isfinite(top := float(distributed.maximum(torch.tensor(self._maxima[name])))):
                reduced[f"train/{name}"] = top
        self._metrics, self._maxima = {}, {}
        return reduced

    def _write_unlogged(self, checkpoint: Path) -> None:
        """What the steps since the last logged one have summed up: there is some only where a signal asked to save."""
        if steps := self.state.global_step - self._globalstep_last_logged:
            sums = {"steps": steps, "loss": float(self._tr_loss), "metrics": self._metrics, "maxima": self._maxima}
            (checkpoint / _UNLOGGED.format(distributed.rank())).write_text(json.dumps(sums), encoding="utf-8")

    def _read_unlogged(self, checkpoint: Path) -> None:
        """Sum on, so that the next logged step is that of a run without an interruption."""
        file = checkpoint / _UNLOGGED.format(distributed.rank())
        self._unlogged = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._metrics, self._maxima = self._unlogged.get("metrics", {}), self._unlogged.get("maxima", {})

    def take_up_loss(self) -> None:
        """The part of the sums that is Trainer's, which it clears when it begins."""
        self._tr_loss += self._unlogged.pop("loss", 0.0)
        self._globalstep_last_logged -= self._unlogged.pop("steps", 0)

    def _diverged(self, what: str) -> RunError:
        return RunError(f"{what}; lower train.learning_rate={self.config.train.learning_rate} and start again")

    def _refuse_non_finite_weights(self) -> None:
        """Before anything is saved: a step can leave weights that only the next step's loss would show."""
        trained = ((name, local(p)) for name, p in causal_lm(self.model).named_parameters() if p.requires_grad)
        if bad := distributed.union(name for name, part in trained if not torch.isfinite(part).all()):
            raise self._diverged(f"step {self.state.global_step}: {bad[0]} is no longer finite")

    def _student_logprobs(self, layout: Layout, temperature: float) -> Tensor:
        inner = causal_lm(self.model)

        def objective(hidden: Tensor) -> Tensor:
            scores = Dense(hidden, read_head(inner, self.vocabulary.size))
            return token_logprobs(scores, layout.targets, temperature=temperature)

        with evaluation_mode(inner):
            return within_forward(inner, layout, objective)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Trainer's formula knows neither rollouts nor teachers."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return whole(norm) if isinstance(norm, Tensor) else norm  # torch 2.9 would log this rank's part of it

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers loads it, in whole weights."""
        if not self._in_shards:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, state_dict=whole_state(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._in_shards:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_shards(Path(output_dir), self.model, self.optimizer)
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / _SCHEDULE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._in_shards:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._in_shards or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(Path(checkpoint), self.optimizer)
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULE, weights_only=True))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written beside its place and moved there when whole: what is called checkpoint-N can be resumed from."""
        self._refuse_non_finite_weights()
        folder = Path(self.config.run.dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / ".saving"
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            distributed.barrier()
            super()._save_checkpoint(model, trial)
            self.windows.save(self._staging / name)
            self._write_unlogged(self._staging / name)
            for teacher in _each(self.teachers):
                teacher.save(self._staging / name)
            distributed.barrier()
            if self.args.should_save:
                seconds = self.earlier_seconds + time.perf_counter() - self._started
                spent = {**self.spent, "seconds": seconds, **ranks_of(self.config)}
                (self._staging / name / SPENT).write_text(json.dumps(spent), encoding="utf-8")
                _put_in_place(self._staging / name, folder, keep=self.config.train.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch's writer has no error type of its own for a full disk: its file's name is what they share.
            if type(error) is RuntimeError and not re.search("inline_container|iostream", str(error)):
                raise
            raise RunError(
                f"run.dir={folder}: {name} could not be saved ({str(error).splitlines()[0]}); earlier checkpoints "
                "are whole: free space and run the same command again"
            ) from error
        finally:
            self._staging = None


def _put_in_place(made: Path, folder: Path, *, keep: int) -> None:
    """Move a whole checkpoint to its place, and what it replaces or outdates out of sight before it is deleted.

    A kill while a folder is deleted then leaves no half checkpoint behind.
    """
    place, staging = folder / made.name, made.parent
    if place.exists():
        place.rename(staging / "replaced")
    made.rename(place)
    for outdated in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[:-keep]:
        outdated.rename(staging / outdated.name)
    shutil.rmtree(staging)


class _StepKeeper(TrainerCallback):
    """Times a step without what is done between steps, and lets a step without a loss token change no weight."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.take_up_loss()
        if self._trainer.is_deepspeed_enabled:
            zero.remember(self._trainer.model_wrapped)
            zero.keep_to_the_student()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.window.counts["loss_tokens"] == 0:
            log.warning("step %d has no loss token: skipped", state.global_step + 1)
            kwargs["optimizer"].zero_grad(set_to_none=True)  # AdamW then leaves weight decay out too

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.step_seconds = time.perf_counter() - self._trainer.step_started
        self._trainer.spent["train_seconds"] += self._trainer.step_seconds
        for teacher in _each(self._trainer.teachers):
            teacher.after_step()
        # A checkpoint then holds no half-summed metrics, the last step is never lost, samples stand beside metrics.
        every, step = self._trainer.config.train.sample_every_steps, state.global_step
        if control.should_save or step == state.max_steps or (every and step % every == 0):
            control.should_log = True


def share_of_step(terms: Terms, counts: Mapping[str, float]) -> Tensor:
    """Σ weight · sum / count. A count of 0 leaves a zero that hangs on the graph."""
    shares = [term.weight * term.sum / (counts[term.count] or math.inf) for term in terms.terms]
    return torch.stack(shares).sum()


def _each(teachers: Mapping[str, Teacher]) -> Iterable[Teacher]:
    """Every teacher once: two names may stand for one."""
    return {id(teacher): teacher for teacher in teachers.values()}.values()


def _ticket(items: list[int]) -> dict[str, Tensor]:
    return {"ticket": torch.tensor(items)}
