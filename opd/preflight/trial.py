"""A few of the run's own prompts, sent through the run's own engine as often as a check wants."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opd import distributed
from opd.config import Config
from opd.data.files import FileExamples
from opd.errors import RunError
from opd.loading import Texts
from opd.model_loading import device_of
from opd.models import computing
from opd.preflight.untouched import as_it_was
from opd.protocols import Batch, Example, ExampleSet, Method, Needs, TokenSequence
from opd.sharding import is_sharded, local
from opd.sources import SequenceSource
from opd.teachers import LocalTeacher, Teacher
from opd.trainer import DistillationTrainer
from opd.window import Batches, RowOrder, Window

_PROMPTS = 4  # of a rank; 2 where they are long
_COMPLETION_TOKENS = 32  # of a rollout
_LOOKED_THROUGH, _SHORT = 64, 1024  # rows, for some of at most so many tokens
_ROOM = 8192  # tokens of a micro-batch, where the run's own may be as large; and at least one row
_STATES = ("none", "zero", "finite", "not finite")  # of a gradient; of parts, the whole's is the last of theirs
_SAMPLED = 50_000_000  # numbers of a gradient that are looked at, spread over all trainable weights


@dataclass(frozen=True)
class Step:
    """What one optimizer step was made of on this rank; with a student in shards loss and gradient are all ranks'.

    `loss` is this rank's share, nats; `gradient` every stride-th number of each trainable weight's; `gradients` says of
    each of these weights whether its whole gradient is "finite", "zero", "none" or "not finite". `terms` are (sum, name
    of its count, weight) of every micro-batch, and `metrics` the method's own (numerator, denominator), summed; both
    always are this rank's. `in_shards`: `gradient` is this rank's part of that of all.
    """

    loss: float
    gradient: list[Tensor]
    gradients: dict[str, str]
    terms: list[tuple[float, str, float]]
    metrics: dict[str, tuple[float, float]]
    in_shards: bool = False

    @cached_property
    def norm(self) -> float:
        """Length of the gradient's sample. Collective where it lies in shards."""
        return self._norm(self.gradient)

    def distance(self, other: Step) -> float:
        """‖mine - other's‖. Collective where they lie in shards."""
        return self._norm([one - two for one, two in zip(self.gradient, other.gradient, strict=True)])

    def _norm(self, tensors: Sequence[Tensor]) -> float:
        squared = sum(float(tensor.double().square().sum()) for tensor in tensors)
        return (_over_ranks(squared) if self.in_shards else squared) ** 0.5


class Replay:
    """A source that samples once: later windows of the same prompts are of the same sequences, none scored yet."""

    def __init__(self, source: SequenceSource) -> None:
        self._source = source
        self._made: dict[tuple[int, ...], tuple[list[TokenSequence], list[TokenSequence]]] = {}

    def sequences(self, prompts: Sequence[tuple[int, Example]]) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """As SequenceSource.sequences."""
        numbers = tuple(number for number, _ in prompts)
        if numbers not in self._made:
            self._made[numbers] = self._source.sequences(prompts)
        everything, sampled = self._made[numbers]
        copies = {id(made): replace(made, token_scores=dict(made.token_scores)) for made in everything}
        return list(copies.values()), [copies[id(made)] for made in sampled]


class Trial:
    """What the checks share: the run with a few prompts in a step, its models, and how exact its arithmetic is."""

    def __init__(
        self,
        config: Config,
        method: Method,
        texts: Texts,
        *,
        student: Any,
        teachers: Mapping[str, Teacher],
        source: SequenceSource,
        folder: str,
    ) -> None:
        self.method, self.needs, self.texts, self.student = method, method.needs, texts, student
        self.teachers = {name: teachers[name] for name in self.needs.teachers}
        self.source = source.capped(_COMPLETION_TOKENS)
        self.replay = Replay(self.source)
        self.examples = _few(config, self.needs, texts.data.train)
        self.config = _small(config, self.needs, self.examples, folder)
        self.trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        self.stride = -(-sum(p.numel() for _, p in self.trained) // _SAMPLED) | 1  # odd: no multiple of a width
        models = [student, *(teacher.model for teacher in self.teachers.values() if isinstance(teacher, LocalTeacher))]
        dtypes = {p.dtype for model in models for p in model.parameters()}  # quantized weights are integers
        self.in_shards = is_sharded(student)
        asked = self.teachers.values()
        self.is_collective = self.in_shards or any(teacher.sharded_model is not None for teacher in asked)
        self.exact = config.hardware.precision == "fp32" and dtypes <= {torch.float32, torch.float64}

    @contextmanager
    def engine(
        self, *, teachers: Mapping[str, Teacher] | None = None, method: Method | None = None
    ) -> Iterator[Engine]:
        """The run's trainer, with these teachers or this method instead; the student's forward is restored."""
        with as_it_was(self.student):
            yield Engine(self, self.teachers if teachers is None else teachers, method or self.method)

    def batches(self, *, micro_batch_size: int | None = None) -> Batches:
        """What lays sequences out, as the run's or in micro-batches of another size."""
        size = micro_batch_size or self.config.train.micro_batch_size
        config = _with(self.config, train={"micro_batch_size": size})
        return Batches(config, self.method, vocabulary=self.texts.vocabulary, device=device_of(config))

    def numbers_of(self, parameter: Tensor) -> Tensor:
        """Every stride-th number of a weight or its gradient, or of this rank's part of it, (n,), a view of it."""
        return local(parameter).detach().view(-1)[:: self.stride]

    def over_ranks(self, value: float) -> float:
        """The sum over all ranks where the student lies in shards, whose gradient is that of all; or else the value."""
        return _over_ranks(value) if self.in_shards else value

    def prompts(self) -> list[tuple[int, Example]]:
        """This rank's numbered prompts of the first step."""
        order, mine = RowOrder(self.examples, self.config.run.seed), self._prompts_per_rank
        first = distributed.rank() * mine
        return [(number, order[number]) for number in range(first, first + mine)]

    @property
    def _prompts_per_rank(self) -> int:
        return self.config.train.batch_size // distributed.world_size()


class Engine:
    """One trainer of a trial: windows, steps that stop before the optimizer, and losses."""

    def __init__(self, trial: Trial, teachers: Mapping[str, Teacher], method: Method) -> None:
        self._trial, self._terms, self._metrics = trial, [], {}
        listened = copy.copy(method)
        listened.loss = self._listening(method)  # type: ignore[method-assign]
        config = trial.config.model_copy(update={"method": method.config})
        self._trainer = DistillationTrainer(
            config,
            trial.student,
            listened,
            tokenizer=None,
            examples=trial.examples,
            source=trial.replay,  # type: ignore[arg-type]
            teachers=teachers,
            vocabulary=trial.texts.vocabulary,
            max_steps=1,
            on_step=lambda step, metrics, window: None,
        )
        accelerator = self._trainer.accelerator
        if accelerator.scaler is not None:  # the scale that training begins with is one that it has to come down from
            accelerator.scaler = torch.amp.GradScaler(config.hardware.device, init_scale=256.0)
        self._model = accelerator.prepare_model(trial.student, evaluation_mode=True)  # autocast, but no reducer

    def window(self) -> Window:
        """The first window of the run, as the training loop asks for it. Collective."""
        number = self._trainer.windows.num_micro_batches
        self._trainer.get_batch_samples(iter(range(number)), number, device_of(self._trial.config))
        return self._trainer.window

    def step(self, window: Window) -> Step:
        """The gradient of this window, accumulated as training does. Raises RunError if the loss is not finite."""
        self._trainer.window = window
        self._trainer.current_gradient_accumulation_steps = len(window.batches)
        if self._trial.is_collective:  # a rank that stopped alone would leave the others waiting
            self._refuse_infinite(window)
        self._terms, self._metrics = [], {}
        self._drop_gradients()
        loss = sum(float(self._trainer.training_step(self._model, _inputs(batch))) for batch in window.batches)
        scaler = self._trainer.accelerator.scaler
        ranks, in_shards = distributed.world_size(), self._trial.in_shards
        # What the loss is multiplied by a reducer would average away; shards are averaged already.
        scale = (1 if in_shards else ranks) * (1.0 if scaler is None else scaler.get_scale())
        states = [_state(parameter.grad) for _, parameter in self._trial.trained]
        if in_shards:
            states = distributed.maximum(torch.tensor(states)).tolist()
        made = Step(
            self._trial.over_ranks(loss / ranks),
            [self._sample(parameter) / scale for _, parameter in self._trial.trained],
            {name: _STATES[state] for (name, _), state in zip(self._trial.trained, states, strict=True)},
            self._terms,
            self._metrics,
            in_shards,
        )
        self._drop_gradients()
        return made

    def loss(self, window: Window) -> float:
        """The window's loss, as Step.loss has it."""
        self._trainer.window = window
        with torch.no_grad():
            shares = [float(self._trainer.compute_loss(self._model, _inputs(batch))) for batch in window.batches]
        return self._trial.over_ranks(sum(shares) / distributed.world_size())

    def student_logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """log π(targets[n]) as a window has it, (N,)."""
        with computing(self._trial.config.hardware):
            return self._trainer._student_logprobs(batch.layout, temperature)

    def _refuse_infinite(self, window: Window) -> None:
        refused = []
        with torch.no_grad():
            for batch in window.batches:
                try:
                    self._trainer.compute_loss(self._model, _inputs(batch))
                except RunError as error:
                    refused.append(error)
        if float(distributed.maximum(torch.tensor(float(len(refused))))):
            raise refused[0] if refused else RunError("the loss of another rank is not finite")

    def _sample(self, parameter: Tensor) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(self._trial.numbers_of(parameter), dtype=torch.float32)
        return self._trial.numbers_of(parameter.grad).float().clone()

    def _drop_gradients(self) -> None:
        for _, parameter in self._trial.trained:
            parameter.grad = None

    def _listening(self, method: Method) -> Any:
        def loss(student, teachers, batch):
            terms = method.loss(student, teachers, batch)
            self._terms += [(float(term.sum.detach()), term.count, term.weight) for term in terms.terms]
            for name, (numerator, denominator) in terms.metrics.items():
                above, below = self._metrics.get(name, (0.0, 0.0))
                self._metrics[name] = (above + float(numerator), below + float(denominator))
            return terms

        return loss


def _few(config: Config, needs: Needs, examples: ExampleSet) -> ExampleSet:
    """As many of the run's first rows as all ranks try; the first that are short enough, or else the shortest."""
    order = RowOrder(examples, config.run.seed)
    head = [order[number] for number in range(min(len(examples), _LOOKED_THROUGH))]
    head.sort(key=lambda row: max(0, _length(row, needs) - _SHORT))
    return FileExamples(head[: _wanted(config) * distributed.world_size()], {})


def _wanted(config: Config) -> int:
    """Prompts of a rank; with packing more, so that a row holds several."""
    return _PROMPTS * (1 + config.train.packing)


def _small(config: Config, needs: Needs, examples: ExampleSet, folder: str) -> Config:
    """A few prompts a step, in micro-batches as large as there is room for."""
    ranks, train = distributed.world_size(), config.train
    per_prompt = config.rollout.group_size * len(needs.sequences)
    order, wanted = RowOrder(examples, config.run.seed), _wanted(config)
    first = distributed.rank() * wanted
    mine = max(_length(order[first + i], needs) for i in range(wanted))
    longest = int(distributed.maximum(torch.tensor(float(mine))))
    data, sampled = config.data, config.rollout.max_completion_tokens
    own = train.micro_batch_size * (data.max_prompt_length + max(data.max_completion_length, sampled))
    fitting = max(min(_ROOM, own) // longest, len(needs.sequences))
    prompts = wanted if wanted * per_prompt <= fitting else 2
    size = min(prompts * per_prompt, fitting // len(needs.sequences) * len(needs.sequences) or len(needs.sequences))
    limit = min(config.rollout.max_completion_tokens, _COMPLETION_TOKENS)
    return _with(
        config,
        run={"dir": folder},
        train={
            "batch_size": prompts * ranks,
            "micro_batch_size": size,
            "max_grad_norm": 0.0,
            "save_every_steps": 0,
            "save_every_epoch": False,
        },
        rollout={"max_completion_tokens": limit},
        hardware={"sharding": "ddp"},  # of a student that lies in shards already; ZeRO's would begin with the training
    )


def _length(example: Example, needs: Needs) -> int:
    """Tokens of the longest thing that is read of this row."""
    prompts = [example.prompt_ids, *example.teacher_prompts.values()]
    completions = [example.completion_ids or [], *example.alternatives.values()]
    rollout = _COMPLETION_TOKENS if needs.rollouts else 0
    return max(map(len, prompts)) + max(rollout, *map(len, completions), 1)


def _with(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with other values in some sections."""
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


def _inputs(batch: Batch) -> dict[str, Batch]:
    """A micro-batch that has not been asked about yet: teachers write into it."""
    return {"batch": replace(batch, token_scores=dict(batch.token_scores))}


def _state(gradient: Tensor | None) -> int:
    """Which of _STATES."""
    if gradient is None:
        return 0
    part = local(gradient)
    return 3 if not torch.isfinite(part).all() else 2 if part.any() else 1


def _over_ranks(value: float) -> float:
    return float(distributed.total(torch.tensor(value, dtype=torch.float64)))
