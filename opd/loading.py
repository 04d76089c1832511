"""From a config to what it names: tokenizers and data first, so that bad input is refused before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.artifacts.folders import holds_scores
from opd.config import Config
from opd.data import DataSet, check_lengths, load_data
from opd.errors import ConfigError
from opd.methods import METHODS
from opd.model_loading import device_of, load_local_teacher
from opd.objectives.alignment import alignment_coverage
from opd.protocols import Method, Needs, TokenSequence
from opd.sources import Sampling, SequenceSource
from opd.sources.text_views import TextViews
from opd.teachers import CachedTeacher, LocalTeacher, SelfTeacher, Teacher
from opd.tokenizers import Shape, Vocabulary, load_tokenizer, read_shape, shared_vocabulary, stop_ids

_COVERED_ROWS = 256


@dataclass
class Texts:
    """What is known before a weight is loaded: tokenizers, what both models can score, and the rows."""

    tokenizer: Any
    vocabulary: Vocabulary
    data: DataSet
    teacher_vocabulary: Vocabulary  # the student's, unless the teacher has another tokenizer
    text_views: TextViews | None = None
    coverage: dict[str, float] = field(default_factory=dict)  # how the data's text falls into both models' tokens
    scores: dict[str, CachedTeacher] = field(default_factory=dict)  # teachers that are kept scores, by name


@dataclass
class Readers:
    """Every model's tokenizer, shape and stop ids, by the config key that names its folder; the student's comes first.

    Known from small files alone, and before anything is compared.
    """

    paths: dict[str, str]
    tokenizers: dict[str, Any]
    shapes: dict[str, Shape]
    stops: dict[str, frozenset[int]]

    @property
    def student(self) -> Any:
        """The student's tokenizer."""
        return self.tokenizers["model.student.path"]

    @property
    def others(self) -> dict[str, Any]:
        """The tokenizers of the teachers."""
        return {key: tokenizer for key, tokenizer in self.tokenizers.items() if key != "model.student.path"}


@dataclass
class Folders:
    """The teachers' folders of a run, by the key that names each."""

    models: dict[str, str] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)


def teacher_folders(config: Config, needs: Needs) -> Folders:
    """Every folder that the method's teachers come from. model.teacher also counts where evaluation measures by it."""
    found, asked = Folders(), needs.asked(config.mode).values()
    for need in asked:
        if need.is_student or need.model == "teacher":
            continue
        path = str(config.at(need.model))
        (found.scores if holds_scores(path) else found.models)[need.model] = path
    wanted = any(need.model == "teacher" for need in asked)
    evaluates = (config.trains or config.mode == "eval") and config.evaluation.divergence
    measured = evaluates and not found.models and not found.scores
    if config.model.teacher.path is not None and (wanted or measured):
        found.models["model.teacher.path"] = config.model.teacher.path
    return found


def load_readers(config: Config, method: Method) -> Readers:
    """What the small files of all models say. Refuses a folder that has no tokenizer or no config."""
    student = config.model.student
    assert student.path is not None
    models = {"model.student.path": (student, student.path)}
    models |= {k: (config.model.teacher, path) for k, path in teacher_folders(config, method.needs).models.items()}
    tokenizers = {key: load_tokenizer(model, path, key) for key, (model, path) in models.items()}
    return Readers(
        {key: path for key, (_, path) in models.items()},
        tokenizers,
        {key: read_shape(model, path, key) for key, (model, path) in models.items()},
        {key: stop_ids(tokenizers[key], path, model) for key, (model, path) in models.items()},
    )


def load_texts(config: Config, method: Method, readers: Readers | None = None) -> Texts:
    """Tokenizers and rows. Refuses teachers that cannot read what the student writes."""
    readers = readers or load_readers(config, method)
    tokenizer, shapes = readers.student, readers.shapes
    stops, teacher = readers.stops["model.student.path"], readers.others.get("model.teacher.path")
    method.prepare(tokenizer, teacher)
    needs = method.needs
    if needs.alignment is not None and teacher is not None:
        mine, theirs = shapes["model.student.path"], shapes["model.teacher.path"]
        vocabulary = shared_vocabulary(tokenizer, {}, [mine.vocab_size], stops)
        teacher_stops = readers.stops["model.teacher.path"]
        teacher_vocabulary = shared_vocabulary(teacher, {}, [theirs.vocab_size], teacher_stops, "model.teacher.path")
        text_views = TextViews(
            tokenizer,
            teacher,
            vocabulary.stop_ids,
            int(teacher.eos_token_id),  # type: ignore[arg-type]  shared_vocabulary has seen that there is one
            needs.alignment.extended,
            needs.alignment.skip_student_eos,
            needs.alignment.skip_teacher_eos,
        )
        reader = teacher
    else:
        text_views, reader = None, None
        widths = [shape.vocab_size for shape in shapes.values()]
        vocabulary = shared_vocabulary(tokenizer, readers.others, widths, stops)
        teacher_vocabulary = vocabulary
    data = load_data(config, tokenizer, needs, vocabulary.stop_ids, teacher_tokenizer=reader)
    check_lengths(config, data, needs, {key: shape.max_positions for key, shape in shapes.items()})
    coverage = {}
    if reader is not None and needs.alignment is not None and needs.alignment.extended:
        coverage = alignment_coverage(_some_texts(data, tokenizer), tokenizer, reader)
    scores = _kept_scores(config, method, vocabulary, data)
    return Texts(tokenizer, vocabulary, data, teacher_vocabulary, text_views, coverage, scores)


def _kept_scores(config: Config, method: Method, vocabulary: Vocabulary, data: DataSet) -> dict[str, CachedTeacher]:
    """The teachers that are kept scores. Refuses those of other sequences than the rows', or of another k."""
    folders = teacher_folders(config, method.needs).scores
    needs = {name: need for name, need in method.needs.teachers.items() if need.model in folders}
    if not needs:
        return {}
    found = {}
    for name, need in needs.items():
        setting = f"{need.model}={folders[need.model]}"
        teacher = CachedTeacher(Path(folders[need.model]), name, device=device_of(config), key=need.model)
        if teacher.top_k != config.at("method.top_k"):
            problem = f"method.top_k={config.at('method.top_k')}: {setting} holds the {teacher.top_k} likeliest ids"
            raise ConfigError(f"{problem}; set it to {teacher.top_k}, or make them again with mode=scores")
        found[name] = teacher
    sequences = all_sequences(data, make_source(config, method, vocabulary, student=None))
    for name, need in needs.items():
        found[name].check([s for s in sequences if need.kinds is None or s.kind in need.kinds])
    return found


def all_sequences(data: DataSet, source: SequenceSource) -> list[TokenSequence]:
    """Of every row in the data's order, however it is split; held-out ones where they have all that is compared."""
    held_out = source.answered(data.evaluation)
    rows = sorted([*(data.train[i] for i in range(len(data.train))), *held_out], key=lambda row: row.row)
    return source.sequences([(row.row, row) for row in rows])[0]


def _some_texts(data: DataSet, tokenizer: Any) -> list[str]:
    """Completions of the first rows, or what stands for them where the data has none."""
    rows = [data.train[i] for i in range(min(len(data.train), _COVERED_ROWS))]
    return [str(tokenizer.decode(row.completion_ids or row.prompt_ids, skip_special_tokens=True)) for row in rows]


def num_steps(config: Config, data: DataSet) -> int:
    """Optimizer steps of the whole run."""
    prompts = max(1, round(len(data.train) * config.train.num_epochs))
    return config.train.max_steps or -(-prompts // config.train.batch_size)


def load_method(config: Config) -> Method:
    """The method of the config."""
    return METHODS[config.method.name](config.method)


def load_teachers(config: Config, method: Method, texts: Texts, student: Any) -> dict[str, Teacher]:
    """The method's teachers by name, and, under "model.teacher.path", the one that evaluation measures by."""
    needs, folders = method.needs, teacher_folders(config, method.needs)
    local: dict[str, Teacher] = {
        key: load_local_teacher(config, path, key, texts.teacher_vocabulary, student)
        for key, path in folders.models.items()
    }
    teachers: dict[str, Teacher] = {}
    for name, need in needs.asked(config.mode).items():
        if need.is_student:
            teachers[name] = SelfTeacher(
                student,
                # What is asked before training needs no copy: the student still is what it was.
                "current" if need.precompute else need.model,  # type: ignore[arg-type]
                vocab_size=texts.vocabulary.size,
                hardware=config.hardware,
                ema_decay=need.ema_decay,
                fresh_adapter=_is_fresh_adapter(config),
            )
        elif name in texts.scores:
            teachers[name] = texts.scores[name]
        else:
            teachers[name] = local["model.teacher.path" if need.model == "teacher" else need.model]
    return {**local, **teachers}


def _is_fresh_adapter(config: Config) -> bool:
    """Whether the student without its adapter is what it was before training: not if the adapter was loaded too."""
    path = config.model.student.path or ""
    return config.model.student.lora is not None and not (Path(path) / "adapter_config.json").is_file()


def make_source(
    config: Config,
    method: Method,
    vocabulary: Vocabulary,
    *,
    student: Any,
    teacher: Teacher | None = None,
    text_views: TextViews | None = None,
) -> SequenceSource:
    """Where this run's sequences come from."""
    return SequenceSource(
        method,
        student=student,
        teacher=teacher.model if isinstance(teacher, LocalTeacher) else None,
        sampling=Sampling.of(config.rollout),
        vocabulary=vocabulary,
        group_size=config.rollout.group_size,
        seed=config.run.seed,
        text_views=text_views,
    )
