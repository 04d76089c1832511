"""The only wiring: from a config to models, data, method and trainer, and from those to a run folder and its report."""

from __future__ import annotations

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from opd.data import check_variant
from opd.early_end import EarlyEnd
from opd.embedded import ensure_models
from opd.errors import ConfigError
from opd.evaluate import Evaluator, MethodLoss
from opd.loading import (
    Texts,
    load_method,
    load_readers,
    load_teachers,
    load_texts,
    make_source,
    num_steps,
)
from opd.model_loading import device_of, load_trained_student, shard_student, student_dtype
from opd.models import load_model, merged
from opd.precompute import keep_logprobs, make_responses, make_scores
from opd.preflight import Checks, Finding
from opd.preflight.data import check_data
from opd.preflight.findings import errors_of
from opd.preflight.gradient import check_gradient
from opd.preflight.pair import check_pair
from opd.protocols import Method
from opd.recorder import Recorder
from opd.sharding import gathered, is_sharded, num_parameters, whole_state
from opd.sources import SequenceSource
from opd.teachers import LocalTeacher, SelfTeacher, Teacher, WithoutAdapter
from opd.trainer import DistillationTrainer

if TYPE_CHECKING:  # importing lm-eval takes seconds
    from opd.lm_tasks import LmTasks

log = logging.getLogger("opd")


@dataclass
class _Run:
    """Everything a run is made of, loaded."""

    config: Config
    folder: RunFolder
    method: Method
    texts: Texts
    student: Any
    teachers: dict[str, Teacher]
    source: SequenceSource
    evaluator: Evaluator
    tasks: LmTasks | None
    max_steps: int
    checks: Checks
    started: float  # by time.perf_counter()


def prepare(config: Config) -> Config:
    """The config with every model on disk: the embedded task's are trained here if they are not kept yet."""
    _quieten(config)
    start_logging()
    if config.data.name == "walk":
        check_variant(config, load_method(config).needs)
    return ensure_models(config)


def run(config: Config) -> dict[str, Any]:
    """One run on this rank, from the banner to the report; returns what result.json holds."""
    _quieten(config)
    if distributed.world_size() > 1:
        start_logging()
    checks = Checks(config)
    if config.mode == "check":
        return _check(config, checks)
    loaded = _load(config, checks)
    if distributed.rank() == 0:
        loaded.folder.create()
    distributed.barrier()
    try:
        return _run(loaded)
    finally:
        loaded.folder.release()


def _run(loaded: _Run) -> dict[str, Any]:
    start_logging(loaded.folder.path)
    _introduce(loaded)
    work = {"train": _experiment, "eval": _experiment, "responses": _respond, "scores": _score}[loaded.config.mode]
    result = work(loaded)
    result["seconds"] = result.get("seconds", 0.0) + time.perf_counter() - loaded.started
    _write_result(loaded, result)
    if loaded.config.mode in ("train", "eval"):
        _conclude(loaded, result)
    return result


def _experiment(loaded: _Run) -> dict[str, Any]:
    """Evaluate, train, evaluate again; or evaluate once."""
    recorder = Recorder(
        loaded.config,
        loaded.folder,
        student=loaded.student,
        tokenizer=loaded.texts.tokenizer,
        evaluator=loaded.evaluator,
        tasks=loaded.tasks,
        max_steps=loaded.max_steps,
    )
    first = "before" if loaded.config.mode == "train" else "evaluation"
    result = {first: loaded.folder.read_result().get(first)}
    if result[first] is None:
        result[first] = recorder.evaluate(0, first, loaded.texts.data.counts())
        _write_result(loaded, result)
    if loaded.config.mode == "train":
        result |= _train(loaded, recorder)
        result["after"] = recorder.evaluate(loaded.max_steps, "after")
        if distributed.rank() == 0 and hasattr(loaded.student, "peft_config"):
            _save_merged(loaded)  # last: the reference is the student with its adapter off
    result["student_parameters"] = num_parameters(loaded.student)
    recorder.close(result)
    return result


def _respond(loaded: _Run) -> dict[str, Any]:
    tokens = make_responses(loaded.config, loaded.texts, loaded.student)
    return {"ledger": {"student_sampled_tokens": tokens}}


def _score(loaded: _Run) -> dict[str, Any]:
    tokens = make_scores(loaded.config, loaded.method, loaded.texts, loaded.source, loaded.teachers)
    return {"ledger": {"teacher_scored_tokens": tokens}}


def _check(config: Config, checks: Checks) -> dict[str, Any]:
    """mode=check: all that can be found out without training. Nothing is written. Raises PreflightError."""
    try:
        _load(config, checks)
    except ConfigError as error:
        # What the pair's check has found too, of the same key, is told once.
        told = {finding.what.partition("=")[0] for finding in errors_of(checks.findings)}
        lines = [line for line in str(error).splitlines() if line.partition("=")[0] not in told]
        refusals = [Finding("config", "error", line) for line in lines]
        checks(lambda: [*refusals, Finding("config", "note", "nothing beyond this refusal is checked yet")])
    checks.tell()
    checks.conclude()
    return {}


def _load(config: Config, checks: Checks) -> _Run:
    """Tokenizers, then data, then weights: what can be refused is refused before the expensive part."""
    started = time.perf_counter()
    folder, method = RunFolder(config), load_method(config)
    readers = load_readers(config, method)
    checks(lambda: check_pair(config, method, readers))
    texts = load_texts(config, method, readers)
    checks(lambda: check_data(config, method, texts))
    checks.enforce()
    tasks = _lm_tasks(config, texts)
    student = None if config.mode == "scores" else load_trained_student(config, method)
    teachers = load_teachers(config, method, texts, student)
    source = make_source(
        config,
        method,
        texts.vocabulary,
        student=student,
        teacher=teachers.get("teacher"),
        text_views=texts.text_views,
    )
    if config.trains:
        shard_student(config, student, teachers.values())
    if not folder.continues:
        checks(lambda: check_gradient(config, method, texts, student=student, teachers=teachers, source=source))
        checks.enforce()
    for name, need in method.needs.asked(config.mode).items():
        if need.precompute:
            with gathered(student) if need.is_student else nullcontext():
                teachers[name] = keep_logprobs(config, method, texts, source, name, teachers[name])
    evaluator = Evaluator(
        config,
        texts.data,
        tokenizer=texts.tokenizer,
        vocabulary=texts.vocabulary,
        teacher=_measured_by(method, teachers, texts),
        objective=_objective(config, method, texts, source, teachers),
    )
    steps = num_steps(config, texts.data)
    return _Run(config, folder, method, texts, student, teachers, source, evaluator, tasks, steps, checks, started)


def _lm_tasks(config: Config, texts: Texts) -> LmTasks | None:
    """The tasks of lm-eval, if any are asked for and something is evaluated."""
    if not config.evaluation.lm_eval.tasks or not (config.trains or config.mode == "eval"):
        return None
    from opd.lm_tasks import LmTasks  # noqa: PLC0415  seconds, and an extra

    return LmTasks(config, texts.tokenizer)


def _objective(
    config: Config, method: Method, texts: Texts, source: SequenceSource, teachers: dict[str, Teacher]
) -> MethodLoss | None:
    """The method's own loss of held-out rows, if it learns from the data's completions alone.

    Not of a model that is only evaluated and would be its own reference: that says nothing.
    """
    needs = method.needs
    samples = needs.rollouts or "response" in needs.sequences
    by_itself = config.mode == "eval" and any(need.is_student for need in needs.teachers.values())
    if samples or by_itself:
        return None
    return MethodLoss(config, method, texts.vocabulary, source, teachers, device_of(config))


def _measured_by(method: Method, teachers: dict[str, Teacher], texts: Texts) -> LocalTeacher | None:
    """The teacher that evaluation takes divergences from: the method's first that reads the student's tokens."""
    if texts.text_views is not None:
        return None
    named = [teachers[name] for name in method.needs.teachers if name in teachers]
    return next((t for t in [*named, *teachers.values()] if isinstance(t, LocalTeacher)), None)


def _train(loaded: _Run, recorder: Recorder) -> dict[str, Any]:
    """Train to the end; returns what it took, `seconds` by earlier commands. A checkpoint of the folder is taken up."""
    config = loaded.config
    trainer = DistillationTrainer(
        config,
        loaded.student,
        loaded.method,
        tokenizer=loaded.texts.tokenizer,
        examples=loaded.texts.data.train,
        source=loaded.source,
        teachers={name: loaded.teachers[name] for name in loaded.method.needs.teachers},
        vocabulary=loaded.texts.vocabulary,
        max_steps=loaded.max_steps,
        on_step=recorder.on_step,
        callbacks=[recorder, EarlyEnd()],
        started=loaded.started,
    )
    try:
        trainer.resume(loaded.folder.checkpoint)
    finally:
        recorder.end_progress()
    _save_final(loaded)
    return {**trainer.spent, "seconds": trainer.earlier_seconds, "steps": loaded.max_steps}


def _save_final(loaded: _Run) -> None:
    """final_model/: what from_pretrained loads. With LoRA final_adapter/. Collective."""
    state = whole_state(loaded.student) if is_sharded(loaded.student) else None
    if distributed.rank() == 0:
        _save(
            loaded, loaded.student, "final_adapter" if hasattr(loaded.student, "peft_config") else "final_model", state
        )


def _save_merged(loaded: _Run) -> None:
    """final_model/ of a student with LoRA; its adapter is gone then."""
    config, adapter = loaded.config, loaded.folder.path / "final_adapter"
    if is_sharded(loaded.student):  # the other ranks hold most of it: from its files, as it was loaded
        dtype = student_dtype(config)
        loaded.student = load_model(
            config.model.student, str(adapter), "run.dir", dtype=dtype, hardware=config.hardware
        )
    else:
        loaded.student = merged(loaded.student, adapter)
    _save(loaded, loaded.student, "final_model")


def _save(loaded: _Run, model: Any, name: str, state: dict[str, torch.Tensor] | None = None) -> None:
    try:
        model.save_pretrained(loaded.folder.path / name, state_dict=state)
        loaded.texts.tokenizer.save_pretrained(loaded.folder.path / name)
    except (OSError, SafetensorError) as error:
        raise loaded.folder.full(name, error) from error


def _write_result(loaded: _Run, result: dict[str, Any]) -> None:
    if distributed.rank() == 0:
        loaded.folder.write_json("result.json", result)


def _conclude(loaded: _Run, result: dict[str, Any]) -> None:
    """The table and the report."""
    if distributed.rank() == 0:
        if loaded.config.mode == "eval":
            table = format_table(before_after_table(result["evaluation"], {}), ("value",))
        else:
            table = format_table(before_after_table(result["before"], result["after"]))
        log.info("%s\n", table)
        report = write_report(loaded.folder.path)
        log.info("report  %s  (%.0f s)", report, result["seconds"])
    distributed.barrier()


def _introduce(loaded: _Run) -> None:
    """The banner, provenance.json, and what the data lost on its way here."""
    config, folder = loaded.config, loaded.folder
    if distributed.rank() > 0:
        return
    models = {"student": config.model.student.path, "teacher": config.model.teacher.path}
    record = provenance(seed=config.run.seed, models=models, data=config.data.paths)
    folder.write_json("provenance.json", {**record, "data": loaded.texts.data.summary})
    log.info("%s\n", banner(config, _facts(loaded)))
    lost = {name: count for name, count in loaded.texts.data.summary.items() if name not in ("rows", "kept") and count}
    if lost:
        log.info("data: %s", ", ".join(f"{name} {count}" for name, count in lost.items()))
    loaded.checks.tell()
    _keep_findings(loaded)
    if found := loaded.texts.coverage:
        log.info("tokens of student and teacher: %s\n", _coverage_line(found))
    for note in loaded.method.notes():
        log.warning("%s\n", note)
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


def _keep_findings(loaded: _Run) -> None:
    """preflight.json. A run that continues made no check of the gradient: what its beginning found stays."""
    found = [finding.record() for finding in loaded.checks.findings]
    file = loaded.folder.path / "preflight.json"
    if loaded.folder.continues and file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        found = [*(record for record in earlier if record not in found), *found]
    loaded.folder.write_json("preflight.json", found)


def _facts(loaded: _Run) -> dict[str, str]:
    """What the banner says that the config alone does not know."""
    models, data = loaded.config.model, loaded.texts.data
    rows = f"{len(data.train)} train, {len(data.evaluation)} eval rows"
    asked = loaded.method.needs.asked(loaded.config.mode)
    teachers = {name: loaded.teachers[name] for name in asked} or loaded.teachers
    return {
        "student": _model_line(models.student.path, loaded.student),
        "teacher": "; ".join(_teacher_line(name, teacher) for name, teacher in teachers.items()) or "none",
        "data": f"{loaded.config.data.path or loaded.config.data.name}: {rows}",
        "steps": str(loaded.max_steps),
    }


def _model_line(path: str | None, model: Any) -> str:
    if model is None:
        return f"{path} (its tokenizer)"
    family = type(model).__name__.removeprefix("FSDP")  # which fully_shard adds to the class
    return f"{path} ({family}, {num_parameters(model):,} parameters)"


def _coverage_line(found: dict[str, float]) -> str:
    """How much of the text both models cut alike; digits apart, which cost most where they do not (docs/methods.md)."""
    parts = [
        f"{label}: {found[prefix + 'one_to_one']:.0%} one to one, {found[prefix + 'multi_token']:.0%} in groups of "
        f"several, {found[prefix + 'dropped']:.0%} in none"
        for label, prefix in (("text", ""), ("digits", "digits_"))
    ]
    return "; ".join(parts)


def _teacher_line(name: str, teacher: Teacher) -> str:
    if isinstance(teacher, LocalTeacher):
        name = "" if name in ("teacher", "model.teacher.path") else f"{name} "
        if isinstance(teacher.model, WithoutAdapter):
            return f"{name}{teacher.model.name_or_path} (the student with its adapter off)"
        return name + _model_line(teacher.model.name_or_path, teacher.model)
    return f"{name} ({'the student itself' if isinstance(teacher, SelfTeacher) else 'kept scores'})"


def _quieten(config: Config) -> None:
    """Threads as configured, and the libraries' chatter off: what matters is said by opd."""
    torch.set_num_threads(config.hardware.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
