"""The only wiring: from a config to models, data, method and trainer, and from those to a run folder and its report."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from opd import distributed
from opd.artifacts.console import banner, start_logging
from opd.artifacts.provenance import provenance
from opd.artifacts.report import write_report
from opd.artifacts.run_folder import RunFolder
from opd.artifacts.table import before_after_table, format_table
from opd.config import Config
from opd.data import DataSet, check_lengths, load_data
from opd.embedded import ensure_models
from opd.evaluate import Evaluator
from opd.methods import METHODS
from opd.models import (
    Vocabulary,
    add_lora,
    check_head,
    disable_dropout,
    freeze,
    load_model,
    load_tokenizer,
    read_shape,
    shared_vocabulary,
    stop_ids,
)
from opd.protocols import Method
from opd.recorder import Recorder
from opd.sources import Sampling, SequenceSource
from opd.teachers import LocalTeacher
from opd.trainer import DistillationTrainer

log = logging.getLogger("opd")


@dataclass
class _Run:
    """Everything a run is made of, loaded."""

    config: Config
    folder: RunFolder
    method: Method
    tokenizer: Any
    vocabulary: Vocabulary
    data: DataSet
    student: Any
    teacher: LocalTeacher | None
    evaluator: Evaluator
    max_steps: int


def prepare(config: Config) -> Config:
    """The config with every model on disk: the embedded task's are trained here if they are not kept yet."""
    _quieten(config)
    start_logging()
    return ensure_models(config)


def run(config: Config) -> dict[str, Any]:
    """One run on this rank, from the banner to the report; returns what result.json holds."""
    started = time.perf_counter()
    _quieten(config)
    if distributed.world_size() > 1:
        start_logging()
    loaded = _load(config)
    if distributed.rank() == 0:
        loaded.folder.create()
    distributed.barrier()
    try:
        return _run(loaded, started)
    finally:
        loaded.folder.release()


def _run(loaded: _Run, started: float) -> dict[str, Any]:
    config = loaded.config
    start_logging(loaded.folder.path)
    _introduce(loaded)
    recorder = Recorder(
        config,
        loaded.folder,
        student=loaded.student,
        tokenizer=loaded.tokenizer,
        evaluator=loaded.evaluator,
        max_steps=loaded.max_steps,
    )
    result = {"before": loaded.folder.read_result().get("before")}
    if result["before"] is None:
        result["before"] = recorder.evaluate(0, "before")
        _write_result(loaded, result)
    if config.mode == "train":
        result |= _train(loaded, recorder)
        result["after"] = recorder.evaluate(loaded.max_steps, "after")
    result["seconds"] = time.perf_counter() - started
    result["student_parameters"] = sum(parameter.numel() for parameter in loaded.student.parameters())
    _write_result(loaded, result)
    recorder.close(result)
    _conclude(loaded, result)
    return result


def _load(config: Config) -> _Run:
    """Tokenizers, then data, then weights: what can be refused is refused before the expensive part."""
    folder = RunFolder(config)
    method = METHODS[config.method.name](config.method)
    tokenizer, vocabulary, max_positions = _load_tokenizers(config)
    data = load_data(config, tokenizer, method.needs, vocabulary.stop_ids)
    check_lengths(config, data, method.needs, max_positions)
    prompts = max(1, round(len(data.train) * config.train.num_epochs))
    steps = config.train.max_steps or -(-prompts // config.train.batch_size)
    student, teacher = _load_student(config, method), _load_teacher(config, vocabulary)
    evaluator = Evaluator(config, data, tokenizer=tokenizer, vocabulary=vocabulary, teacher=teacher)
    return _Run(config, folder, method, tokenizer, vocabulary, data, student, teacher, evaluator, steps)


def _load_tokenizers(config: Config) -> tuple[Any, Vocabulary, dict[str, int | None]]:
    """The student's tokenizer, what it shares with the teacher's, and the longest sequence of each model."""
    tokenizers, shapes = {}, {}
    for key, model in (("model.student.path", config.model.student), ("model.teacher.path", config.model.teacher)):
        if model.path is not None:
            tokenizers[key] = load_tokenizer(model, model.path, key)
            shapes[key] = read_shape(model, model.path, key)
    student = config.model.student
    assert student.path is not None
    tokenizer = tokenizers["model.student.path"]
    vocabulary = shared_vocabulary(
        tokenizer,
        tokenizers.get("model.teacher.path"),
        [shape.vocab_size for shape in shapes.values()],
        stop_ids(tokenizer, student.path, student),
    )
    teacher = tokenizers.get("model.teacher.path")
    if teacher is not None and teacher.eos_token_id not in vocabulary.stop_ids:
        log.warning(
            "model.teacher.path=%s ends its answers with %r, the student with %s: what the teacher calls the end, the "
            "student's rollouts go past; give both the same end token (often a base model beside an instruct model)",
            config.model.teacher.path,
            teacher.eos_token,
            tokenizer.convert_ids_to_tokens(sorted(vocabulary.stop_ids)),
        )
    return tokenizer, vocabulary, {key: shape.max_positions for key, shape in shapes.items()}


def _load_student(config: Config, method: Method) -> Any:
    student = config.model.student
    assert student.path is not None
    model: Any = load_model(student, student.path, "model.student.path", dtype=torch.float32)
    check_head(model, "model.student.path")
    if not method.needs.student_dropout:
        disable_dropout(model)
    if student.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if student.lora is not None:
        torch.manual_seed(config.run.seed)
        model = add_lora(model, student.lora)
    return model.to(_device(config))


def _load_teacher(config: Config, vocabulary: Vocabulary) -> LocalTeacher | None:
    teacher = config.model.teacher
    if teacher.path is None:
        return None
    dtype = torch.bfloat16 if config.hardware.precision == "bf16" else torch.float32
    model: Any = freeze(load_model(teacher, teacher.path, "model.teacher.path", dtype=dtype))
    model.to(_device(config))
    check_head(model, "model.teacher.path")
    return LocalTeacher(model, vocab_size=vocabulary.size, top_k=teacher.top_k)


def _train(loaded: _Run, recorder: Recorder) -> dict[str, Any]:
    """Train to the end; returns what it took. A checkpoint of the folder is taken up."""
    config = loaded.config
    rollout = config.rollout
    sampling = Sampling(
        rollout.max_completion_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.batch_size
    )
    source = SequenceSource(
        loaded.method,
        student=loaded.student,
        teacher=loaded.teacher.model if loaded.teacher else None,
        sampling=sampling,
        vocabulary=loaded.vocabulary,
        group_size=rollout.group_size,
        seed=config.run.seed,
    )
    trainer = DistillationTrainer(
        config,
        loaded.student,
        loaded.method,
        tokenizer=loaded.tokenizer,
        examples=loaded.data.train,
        source=source,
        teachers={name: loaded.teacher for name in loaded.method.needs.teachers if loaded.teacher},
        vocabulary=loaded.vocabulary,
        max_steps=loaded.max_steps,
        on_step=recorder.on_step,
        callbacks=[recorder],
    )
    try:
        trainer.resume(loaded.folder.checkpoint)
    finally:
        recorder.end_progress()
    if distributed.rank() == 0:
        _save_final(loaded)
    return {**trainer.spent, "steps": loaded.max_steps}


def _save_final(loaded: _Run) -> None:
    """final_model/: what from_pretrained loads. With LoRA the merged model, and final_adapter/ beside it."""
    folder, model = loaded.folder.path, loaded.student
    try:
        if loaded.config.model.student.lora is not None:
            model.save_pretrained(folder / "final_adapter")
            model = model.merge_and_unload()
            loaded.student = model
        model.save_pretrained(folder / "final_model")
        loaded.tokenizer.save_pretrained(folder / "final_model")
    except (OSError, SafetensorError) as error:
        raise loaded.folder.full("final_model", error) from error


def _write_result(loaded: _Run, result: dict[str, Any]) -> None:
    if distributed.rank() == 0:
        loaded.folder.write_json("result.json", result)


def _conclude(loaded: _Run, result: dict[str, Any]) -> None:
    """The table and the report."""
    if distributed.rank() == 0:
        log.info("%s\n", format_table(before_after_table(result["before"], result.get("after", {}))))
        report = write_report(loaded.folder.path)
        log.info("report  %s  (%.0f s)", report, result["seconds"])
    distributed.barrier()


def _introduce(loaded: _Run) -> None:
    """The banner, provenance.json, and what the data lost on its way here."""
    config, folder = loaded.config, loaded.folder
    if distributed.rank() > 0:
        return
    models = {"student": config.model.student.path, "teacher": config.model.teacher.path}
    record = provenance(seed=config.run.seed, models=models, data=config.data.path)
    folder.write_json("provenance.json", {**record, "data": loaded.data.summary})
    log.info("%s\n", banner(config, _facts(loaded)))
    lost = {name: count for name, count in loaded.data.summary.items() if name not in ("rows", "kept") and count}
    if lost:
        log.info("data: %s", ", ".join(f"{name} {count}" for name, count in lost.items()))
    sharpened = config.rollout.temperature != 1 or config.rollout.top_p < 1 or config.rollout.top_k
    if sharpened and loaded.method.needs.window:
        log.warning(
            "rollout.temperature=%s rollout.top_p=%s: the rollouts are not samples of the student's own "
            "distribution, so this estimates the KL at sharpened states; set both to 1 for the exact estimator\n",
            config.rollout.temperature,
            config.rollout.top_p,
        )
    if folder.continues:
        log.info("continues the interrupted run in %s from step %d\n", folder.path, folder.resumed_step)


def _facts(loaded: _Run) -> dict[str, str]:
    """What the banner says that the config alone does not know."""
    teacher = loaded.teacher.model if loaded.teacher else None
    models = loaded.config.model
    rows = f"{len(loaded.data.train)} train, {len(loaded.data.evaluation)} eval rows"
    return {
        "student": _model_line(models.student.path, loaded.student),
        "teacher": "none" if teacher is None else _model_line(models.teacher.path, teacher),
        "data": f"{loaded.config.data.path or loaded.config.data.name}: {rows}",
        "steps": str(loaded.max_steps),
    }


def _model_line(path: str | None, model: Any) -> str:
    return f"{path} ({type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters)"


def _device(config: Config) -> torch.device:
    kind = config.hardware.device
    return torch.device(kind, distributed.local_rank()) if kind == "cuda" else torch.device(kind)


def _quieten(config: Config) -> None:
    """Threads as configured, and the libraries' chatter off: what matters is said by opd."""
    torch.set_num_threads(config.hardware.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
