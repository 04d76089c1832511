"""A few thousand parameters, sixteen ragged rows, and one function that trains them and tells all of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from opd.config import Config
from opd.methods import METHODS
from opd.models import Vocabulary, disable_dropout, freeze
from opd.protocols import Example, TokenSequence
from opd.sources import Sampling, SequenceSource
from opd.teachers import LocalTeacher
from opd.trainer import DistillationTrainer
from opd.window import Window

gc.freeze()  # every training begins with a collection, which these imports alone make ten times as long as the training

STUDENT_VOCAB, TEACHER_VOCAB = 64, 80  # the teacher's table is padded; no tokenizer id reaches 60
STOPS = frozenset({3, 7, 11, 19, 23, 31, 43, 59})  # many, so that rollouts end at ragged lengths
PAD = 0
VOCABULARY = Vocabulary(STUDENT_VOCAB, STOPS, PAD)
NUM_ROWS = 48

# What makes each architecture tiny; the rest is the family's own default.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 6},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 32},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt_neox": {"rotary_pct": 0.5},
}


def make_model(kind: str, seed: int, vocab_size: int = STUDENT_VOCAB, **settings: Any) -> PreTrainedModel:
    """A random model of the family; wide initial weights, so that its distributions are far from uniform."""
    from transformers import AutoConfig

    common = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(kind, **{**common, **SHAPES[kind], **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # biases and norms too: nothing is left at 0 or 1
            if parameter.dim() < 2:
                parameter.data += 0.1 * torch.randn_like(parameter)
    disable_dropout(model)
    return model


def make_examples(num_rows: int = NUM_ROWS) -> list[Example]:
    """Ragged rows. Every prompt holds the pad id or a stop id as a real token; some completions have a hole in the mask."""
    draw = np.random.default_rng(5)
    rows = []
    for row in range(num_rows):
        prompt = draw.integers(0, 60, draw.integers(1, 9)).tolist()
        prompt[len(prompt) // 2] = (PAD, min(STOPS))[row % 2]
        completion = [*draw.choice([1, 2, 5, 13, 29, 47], draw.integers(0, 7)).tolist(), int(draw.choice(list(STOPS)))]
        mask = None
        if row % 3 == 0 and len(completion) > 3:
            mask = [k != 1 for k in range(len(completion))]
        rows.append(Example(row, prompt, completion, mask))
    return rows


class EmptyingSource(SequenceSource):
    """A source whose chosen prompts come without a single loss token; `empties(number)` of the prompt in the run."""

    def __init__(self, *args: Any, empties: Callable[[int], bool], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._empties = empties

    def sequences(self, prompts: Sequence[tuple[int, Example]]) -> tuple[list[TokenSequence], list[Any]]:
        made, sampled = super().sequences(prompts)
        for i, sequence in enumerate(made):
            if self._empties(prompts[i // self._group_size][0]):
                sequence.completion_ids, sequence.completion_mask = [], []
        return made, sampled


@dataclass
class Told:
    """What a training said of itself."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    student: Any = None

    @property
    def losses(self) -> list[float]:
        return [record["train/loss"] for record in self.metrics]

    @property
    def named(self) -> list[dict[str, float]]:
        """The metrics that do not tell the time."""
        return [{k: v for k, v in record.items() if "second" not in k} for record in self.metrics]

    @property
    def rollouts(self) -> list[list[int]]:
        return [sequence.completion_ids for window in self.windows for sequence in window.sequences]


class Listener(TrainerCallback):
    """Keeps the gradient of every step, and calls `after_step(trainer)`."""

    def __init__(self, told: Told, after_step: Callable[[], None] | None) -> None:
        self._told, self._after_step = told, after_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self._told.gradients.append(
            {name.removeprefix("module."): p.grad.detach().clone() for name, p in named if p.grad is not None}
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._after_step:
            self._after_step()


def no_row(number: int) -> bool:
    return False


def fourth_of_the_step(number: int) -> bool:
    return number % 16 == 3


def make_trainer(
    config: Config,
    *,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    steps: int = 1,
    examples: Sequence[Example] | None = None,
    vocabulary: Vocabulary = VOCABULARY,
    empties: Callable[[int], bool] = no_row,
    after_step: Callable[[], None] | None = None,
) -> tuple[DistillationTrainer, Told]:
    """The real trainer around these models, and what it will have told."""
    method, told, rollout = METHODS[config.method.name](config.method), Told(student=student), config.rollout
    source = EmptyingSource(
        method,
        student=student,
        teacher=teacher,
        sampling=Sampling(
            rollout.max_completion_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.batch_size
        ),
        vocabulary=vocabulary,
        group_size=rollout.group_size,
        seed=config.run.seed,
        empties=empties,
    )
    local = None
    if teacher is not None:
        local = LocalTeacher(freeze(teacher), vocab_size=vocabulary.size, top_k=config.model.teacher.top_k)

    def on_step(step: int, metrics: dict[str, float], window: Window) -> None:
        told.metrics.append(metrics)
        told.windows.append(window)

    trainer = DistillationTrainer(
        config,
        student,
        method,
        tokenizer=None,
        examples=make_examples() if examples is None else examples,
        source=source,
        teachers={name: local for name in method.needs.teachers if local},
        vocabulary=vocabulary,
        max_steps=steps,
        on_step=on_step,
        callbacks=[Listener(told, after_step)],
    )
    return trainer, told


def train(config: Config, *, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Told:
    """Train a student of this family for `steps` steps by a Llama; see `make_trainer` for the rest."""
    settings.setdefault("student", make_model(kind, seed=1).to(dtype))
    settings.setdefault("teacher", make_model("llama", seed=2, vocab_size=TEACHER_VOCAB).to(dtype))
    trainer, told = make_trainer(config, **settings)
    trainer.train()
    return told


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖one - other‖ / ‖other‖ over all parameters."""
    assert one.keys() == other.keys()
    gap = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (gap / sum(float(value.double().square().sum()) for value in other.values())) ** 0.5


def assert_same_numbers(one: dict[str, float], other: dict[str, float], relative: float) -> None:
    """Equal metrics, by name; near zero the tolerance is absolute."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        gap = abs(value - other[name])
        assert gap <= relative * max(1.0, abs(value)), f"{name}: {value} and {other[name]}"
