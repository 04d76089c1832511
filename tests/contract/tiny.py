"""A few thousand parameters, ragged rows, and one function that trains on them by any method and tells all of it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from contract.tokens import PAD, STOPS, student_tokenizer, teacher_tokenizer
from contract.variants import KEPT, changed, method_needs
from opd.config import Config
from opd.data import DataSet
from opd.loading import Texts
from opd.methods import METHODS
from opd.model_loading import shard_student
from opd.models import disable_dropout, freeze
from opd.precompute import keep_logprobs, make_scores
from opd.protocols import Example, Method, Needs, TeacherNeed, TokenSequence
from opd.sharding import whole
from opd.sources import Sampling, SequenceSource
from opd.sources.text_views import TextViews
from opd.teachers import CachedTeacher, LocalTeacher, SelfTeacher, Teacher
from opd.tokenizers import Vocabulary
from opd.trainer import DistillationTrainer
from opd.window import Window

gc.freeze()  # every training begins with a collection, which these imports alone make ten times as long as the training

STUDENT_VOCAB, TEACHER_VOCAB = 64, 80  # both tables are padded: no id of their tokenizers reaches 60 and 76
VOCABULARY = Vocabulary(STUDENT_VOCAB, frozenset(STOPS), PAD)
NUM_ROWS = 48
_NUMBERS = itertools.count()

Models = Mapping[str, PreTrainedModel]
Empties = Callable[[int, str], bool]

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
    """Ragged rows, each a preference pair with a stored response too.

    Every prompt holds the pad id or a stop id as a real token; some completions have a hole in the mask.
    """
    draw = np.random.default_rng(5)
    rows = []
    for row in range(num_rows):
        prompt = draw.integers(0, 60, draw.integers(1, 9)).tolist()
        prompt[len(prompt) // 2] = (PAD, min(STOPS))[row % 2]
        completion = _completion(draw)
        mask = None
        if row % 3 == 0 and len(completion) > 3:
            mask = [k != 1 for k in range(len(completion))]
        others = np.random.default_rng((6, row))
        alternatives = {"rejected": _completion(others), "response": _completion(others)}
        rows.append(Example(row, prompt, completion, mask, alternatives=alternatives))
    return rows


def _completion(draw: np.random.Generator) -> list[int]:
    return [*draw.choice([1, 2, 5, 13, 29, 47], draw.integers(0, 7)).tolist(), int(draw.choice(STOPS))]


def as_needed(example: Example, needs: Needs) -> Example:
    """The row with what the method reads beside it: other answers, and a teacher's own prompt where it has one."""
    alternatives = {kind: [9, 8, 12, *example.prompt_ids[:2], STOPS[1]] for kind in ("rejected", "response")}
    prompts = example.teacher_prompts
    if not prompts and needs.privileged is not None:
        prompts = {"teacher": [21, PAD, 33 + example.row % 7, *example.prompt_ids, 50]}
    if not prompts and needs.alignment is not None:
        prompts = {"teacher": [1, *((7 * token + 3) % 76 for token in example.prompt_ids)]}
    return replace(example, alternatives={**alternatives, **example.alternatives}, teacher_prompts=prompts)


class EmptyingSource(SequenceSource):
    """A source whose chosen sequences come without a single loss token; `empties(number of the prompt, kind)`.

    `backwards`: a step's prompts in the opposite order.
    """

    def __init__(self, *args: Any, empties: Empties, backwards: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._empties, self._backwards = empties, backwards

    def sequences(self, prompts: Sequence[tuple[int, Example]]) -> tuple[list[TokenSequence], list[TokenSequence]]:
        prompts = list(prompts)[::-1] if self._backwards else prompts
        made, sampled = super().sequences(prompts)
        for sequence, (number, example) in zip(made, self._each(prompts), strict=True):
            if self._empties(number, sequence.kind):
                self.empty(sequence, example)
        return made, sampled

    def empty(self, sequence: TokenSequence, example: Example) -> None:
        """Cut the sequence to its prompt, in every view; where the prompt is learnt too, to the token nobody predicts."""
        rest = len(sequence.prompt_ids) == 0
        sequence.completion_ids = sequence.completion_ids[:rest]
        sequence.completion_mask = sequence.completion_mask[:rest]
        sequence.token_scores = {name: values[:0] for name, values in sequence.token_scores.items()}
        self._add_views(sequence, example)

    def _each(self, prompts: Sequence[tuple[int, Example]]) -> list[tuple[int, Example]]:
        return [prompt for prompt in prompts for _ in range(self._group_size * len(self._needs.sequences))]


class WholeAndEmpty(EmptyingSource):
    """Every sequence as it is and as `empty` leaves it: what a teacher that is asked before training has to know."""

    def sequences(self, prompts: Sequence[tuple[int, Example]]) -> tuple[list[TokenSequence], list[TokenSequence]]:
        whole, empty = (SequenceSource.sequences(self, prompts) for _ in range(2))
        for sequence, (_, example) in zip(empty[0], self._each(prompts), strict=True):
            self.empty(sequence, example)
        return whole[0] + empty[0], []


@dataclass
class Told:
    """What a training said of itself."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    student: Any = None
    teachers: dict[str, Teacher] = field(default_factory=dict)
    source: Any = None

    @property
    def losses(self) -> list[float]:
        return [record["train/loss"] for record in self.metrics]

    @property
    def named(self) -> list[dict[str, float]]:
        """The metrics that do not tell the time."""
        return [{k: v for k, v in record.items() if "second" not in k} for record in self.metrics]

    @property
    def sequences(self) -> list[TokenSequence]:
        return [sequence for window in self.windows for sequence in window.sequences]

    @property
    def rollouts(self) -> list[list[int]]:
        return [sequence.completion_ids for sequence in self.sequences]


class Listener(TrainerCallback):
    """Keeps the gradient of every step, and calls `after_step()`."""

    def __init__(self, told: Told, after_step: Callable[[], None] | None) -> None:
        self._told, self._after_step = told, after_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self._told.gradients.append(
            {name.removeprefix("module."): whole(p.grad.detach()).clone() for name, p in named if p.grad is not None}
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._after_step:
            self._after_step()


def no_row(number: int, kind: str) -> bool:
    return False


def some_of_the_step(number: int, kind: str) -> bool:
    """A prompt of sixteen without a loss token, and one whose second sequence has none, where there are two."""
    return number % 16 == 3 or (number % 16 == 5 and kind in ("rejected", "response"))


def asking(config: Config) -> Config:
    """The config under which teachers are asked whose kept scores this one reads; itself, if it reads none."""
    needs = method_needs(config).teachers.values()
    return changed(config, method={need.model.split(".")[1]: None for need in needs if is_kept(need, config)})


def is_kept(need: TeacherNeed, config: Config) -> bool:
    """Whether the need is met by scores that were kept."""
    return not need.is_student and need.model != "teacher" and config.at(need.model) == KEPT


def make_models(config: Config, *, vocab_size: int = TEACHER_VOCAB, dtype: Any = None) -> dict[str, PreTrainedModel]:
    """A random Llama for everything that the method's teachers come from but the student: {"teacher" or the key: …}."""
    needs = method_needs(asking(config)).teachers.values()
    keys = dict.fromkeys(need.model for need in needs if not need.is_student)
    return {key: make_model("llama", 2 + i, vocab_size).to(dtype) for i, key in enumerate(keys)}


def make_teachers(config: Config, method: Method, student: Any, models: Models, size: int) -> dict[str, Teacher]:
    """The method's teachers by name, as a run makes them of `models` and the student."""
    local = {
        key: LocalTeacher(freeze(model), vocab_size=size, top_k=config.model.teacher.top_k)
        for key, model in models.items()
    }
    return {
        name: SelfTeacher(
            student,
            need.model,  # type: ignore[arg-type]
            vocab_size=size,
            hardware=config.hardware,
            ema_decay=need.ema_decay,
            fresh_adapter=hasattr(student, "peft_config"),
        )
        if need.is_student
        else local[need.model]
        for name, need in method.needs.teachers.items()
    }


def keep(config: Config, method: Method, texts: Texts, source: SequenceSource, student: Any, models: Models) -> Any:
    """The method's teachers, those of them replaced that are asked before training: kept scores, log-probabilities."""
    folder = Path(config.run.dir) / f"kept-{next(_NUMBERS)}"
    live = changed(asking(config), run={"dir": str(folder)}, artifacts={"dir": str(folder)})
    asked = METHODS[live.method.name](live.method)
    teachers = make_teachers(live, asked, student, models, texts.teacher_vocabulary.size)
    if live.method != config.method:
        folder.mkdir(parents=True, exist_ok=True)
        make_scores(live.model_copy(update={"mode": "scores"}), asked, texts, source, teachers)
    for name, need in method.needs.teachers.items():
        if is_kept(need, config):
            teachers[name] = CachedTeacher(folder, name, device=torch.device("cpu"), key=need.model)
        elif need.precompute:
            teachers[name] = keep_logprobs(live, method, texts, source, name, teachers[name])
    return teachers


def make_trainer(
    config: Config,
    *,
    student: Any,
    models: Models | None = None,
    steps: int = 1,
    examples: Sequence[Example] | None = None,
    vocabulary: Vocabulary = VOCABULARY,
    empties: Empties = no_row,
    backwards: bool = False,
    after_step: Callable[[], None] | None = None,
    tokenizer: Any = None,
) -> tuple[DistillationTrainer, Told]:
    """The real trainer around these models, and what it will have told. `tokenizer`: the teacher's, if not its own."""
    method, rollout = METHODS[config.method.name](config.method), config.rollout
    models = make_models(config) if models is None else models
    alignment, text_views, teacher_vocabulary = method.needs.alignment, None, vocabulary
    theirs = (tokenizer or teacher_tokenizer()) if alignment is not None else student_tokenizer()
    method.prepare(student_tokenizer(), theirs)
    if alignment is not None:
        width = models["teacher"].get_input_embeddings().num_embeddings  # type: ignore[union-attr]
        teacher_vocabulary = Vocabulary(width, frozenset({theirs.eos_token_id}), theirs.pad_token_id)
        text_views = TextViews(
            student_tokenizer(),
            theirs,
            vocabulary.stop_ids,
            theirs.eos_token_id,
            alignment.extended,
            alignment.skip_student_eos,
            alignment.skip_teacher_eos,
        )
    rows = [as_needed(example, method.needs) for example in (make_examples() if examples is None else examples)]
    settings: dict[str, Any] = {
        "student": student,
        "teacher": models.get("teacher"),
        "sampling": Sampling(
            rollout.max_completion_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.batch_size
        ),
        "vocabulary": vocabulary,
        "group_size": rollout.group_size,
        "seed": config.run.seed,
        "text_views": text_views,
        "empties": empties,
        "backwards": backwards,
    }
    source = EmptyingSource(method, **settings)
    data = DataSet(rows, rows[:6], lambda example, text, finished: {})
    texts = Texts(student_tokenizer(), vocabulary, data, teacher_vocabulary, text_views)
    teachers = keep(config, method, texts, WholeAndEmpty(method, **settings), student, models)
    shard_student(config, student, teachers.values())
    told = Told(student=student, teachers=teachers, source=source)

    def on_step(step: int, metrics: dict[str, float], window: Window) -> None:
        told.metrics.append(metrics)
        told.windows.append(window)

    trainer = DistillationTrainer(
        config,
        student,
        method,
        tokenizer=None,
        examples=rows,
        source=source,
        teachers=teachers,
        vocabulary=vocabulary,
        max_steps=steps,
        on_step=on_step,
        callbacks=[Listener(told, after_step)],
    )
    return trainer, told


def train(config: Config, *, kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Told:
    """Train a student of this family for `steps` steps by random Llamas; see `make_trainer` for the rest."""
    settings.setdefault("student", make_model(kind, seed=1).to(dtype))
    settings.setdefault("models", make_models(config, dtype=dtype))
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
    ties = abs(one.get("train/reward_margin", 1.0)) < relative  # a student that is its reference: rounding decides
    for name, value in one.items():
        if ties and name == "train/accuracy":
            continue
        gap = abs(value - other[name])
        assert gap <= relative * max(1.0, abs(value)), f"{name}: {value} and {other[name]}"
