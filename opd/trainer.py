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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from opd import distributed
from opd.config import Config
from opd.errors import RunError
from opd.model_loading import device_of
from opd.models import attach_objective, causal_lm, computing, evaluation_mode, predicting_states, read_head
from opd.objectives import token_logprobs
from opd.protocols import Dense, ExampleSet, Layout, Method, Terms
from opd.sources import SequenceSource
from opd.teachers import Teacher, ask_teachers
from opd.tokenizers import Vocabulary
from opd.window import Window, WindowBuilder

log = logging.getLogger("opd")
_SPENT = "spent.json"  # in a checkpoint: seconds and tokens up to it
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
    ) -> None:
        self.config, self.method, self.teachers, self.vocabulary = config, method, teachers, vocabulary
        self._on_step, self._metrics, self._maxima = on_step, {}, {}
        self._staging: Path | None = None
        self.step_started = self.step_seconds = 0.0
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
            training_arguments(config, max_steps, self.windows.num_micro_batches, _save_every(config, len(examples))),
            train_dataset=tickets,  # type: ignore[arg-type]
            data_collator=_ticket,
            processing_class=tokenizer,
            callbacks=[_StepKeeper(self), *(callbacks or [])],
        )

    def resume(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if there is one."""
        if checkpoint is not None:
            self.windows.load(checkpoint)
            for teacher in _each(self.teachers):
                teacher.load(checkpoint)
            self.spent = json.loads((checkpoint / _SPENT).read_text(encoding="utf-8"))
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self._refuse_non_finite_weights()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """The window of the step that comes next. The data loader only counts; rows are addressed by step."""
        for _ in range(num_batches):
            next(epoch_iterator)
        self.step_started = time.perf_counter()
        with computing(self.config.hardware):
            self.window = self.windows(self.state.global_step)
        self._keep_ledger(self.window)
        for name, pair in self.window.metrics.items():
            self._add(name, *pair)  # every rank holds the sums of all: their ratio is the same
        if len(self.window.batches) != num_batches:
            raise RunError(
                f"step {self.state.global_step}: {len(self.window.batches)} micro-batches, not {num_batches}"
            )
        return [{"batch": batch} for batch in self.window.batches], None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss, times the number of ranks that the reducer averages over."""
        batch = inputs["batch"]
        scores = ask_teachers(self.method.needs, self.teachers, batch)
        inner = causal_lm(model)

        def objective(hidden: Tensor) -> Terms:
            return self.method.loss(Dense(hidden, read_head(inner, self.vocabulary.size)), scores, batch)

        terms = model(layout=batch.layout, objective=objective)
        self._note(terms)
        loss = share_of_step(terms, self.window.counts)
        if not math.isfinite(value := float(loss.detach())):
            raise self._diverged(f"step {self.state.global_step + 1}: the loss is {value}")
        return loss * distributed.world_size()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A logged step under opd's names; metrics are over all steps since the last. Trainer's summary is left out."""
        if "loss" not in logs:
            return
        window, step = self.window, self.state.global_step
        record = {
            "train/loss": logs["loss"],
            "train/grad_norm": logs["grad_norm"],
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

    def _diverged(self, what: str) -> RunError:
        return RunError(f"{what}; lower train.learning_rate={self.config.train.learning_rate} and start again")

    def _refuse_non_finite_weights(self) -> None:
        """Before anything is saved: a step can leave weights that only the next step's loss would show."""
        for name, parameter in causal_lm(self.model).named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise self._diverged(f"step {self.state.global_step}: {name} is no longer finite")

    def _student_logprobs(self, layout: Layout, temperature: float) -> Tensor:
        inner = causal_lm(self.model)
        with evaluation_mode(inner):
            scores = Dense(predicting_states(inner, layout), read_head(inner, self.vocabulary.size))
            return token_logprobs(scores, layout.targets, temperature=temperature)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Trainer's formula knows neither rollouts nor teachers."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

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
            for teacher in _each(self.teachers):
                teacher.save(self._staging / name)
            distributed.barrier()
            if self.args.should_save:
                (self._staging / name / _SPENT).write_text(json.dumps(self.spent), encoding="utf-8")
                shutil.rmtree(folder / name, ignore_errors=True)
                (self._staging / name).rename(folder / name)
                self._staging.rmdir()
                rotate_checkpoints(output_dir=str(folder), save_total_limit=self.config.train.keep_checkpoints)
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


class _StepKeeper(TrainerCallback):
    """Times a step without what is done between steps, and lets a step without a loss token change no weight."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

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


def _save_every(config: Config, num_rows: int) -> int:
    """Steps between checkpoints; 0: none."""
    train = config.train
    return -(-num_rows // train.batch_size) if train.save_every_epoch else train.save_every_steps


def training_arguments(config: Config, max_steps: int, num_micro_batches: int, save_every: int) -> TrainingArguments:
    """opd's settings as transformers names them; logging, evaluation and trackers are opd's own."""
    train, hardware = config.train, config.hardware
    warmup = train.warmup_steps or math.ceil(train.warmup_ratio * max_steps)
    schedule = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine_with_min_lr"}
    arguments = TrainingArguments(
        output_dir=config.run.dir,
        seed=config.run.seed % 2**32,
        max_steps=max_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=num_micro_batches,
        learning_rate=train.learning_rate,
        optim={"adamw": "adamw_torch", "rmsprop": "rmsprop", "sgd": "sgd"}[train.optimizer],
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        weight_decay=train.weight_decay,
        lr_scheduler_type=schedule[train.lr_scheduler],
        lr_scheduler_kwargs={"min_lr_rate": train.min_lr_ratio} if train.lr_scheduler == "cosine" else None,
        warmup_steps=warmup,
        max_grad_norm=train.max_grad_norm,
        logging_steps=train.log_every_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        bf16=hardware.precision == "bf16",
        fp16=hardware.precision == "fp16",
        use_cpu=hardware.device == "cpu",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:  # one process uses one GPU: transformers would spread its batches over all it can see
        arguments._n_gpu = 1
    return arguments


def _ticket(items: list[int]) -> dict[str, Tensor]:
    return {"ticket": torch.tensor(items)}
