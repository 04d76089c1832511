"""What the checks refuse: exit code 3 with the list, and nothing written, by mode=check and before a training alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.bad_input import Case, Place
from e2e.command import call, snapshot
from e2e.model_folders import build_model, build_tokenizer


def _teacher_of_another_family(place: Place) -> Case:
    place.teacher = build_model(place.folder / "teacher", tokenizer=build_tokenizer(reverse=True))
    return (), ("error pair.tokenizer: model.teacher.path=", "tokens differ", "or method=gold")


def _teacher_narrower_than_the_tokenizer(place: Place) -> Case:
    place.teacher = build_model(place.folder / "teacher", width=270)
    return (), ("error pair.width: model.student.path=", "ids up to 278", "choose models whose embedding tables cover")


def _student_without_an_end(place: Place) -> Case:
    place.copy_student()
    place.edit("tokenizer_config.json", eos_token=None)
    (place.student / "generation_config.json").unlink()
    return (), ("error config: model.student.path=", "has no eos token", "set eos_token")


def _teacher_that_is_the_student(place: Place) -> Case:
    place.teacher = place.student
    return (), ("error gradient.descent: the loss has no gradient", "is the teacher the student itself")


def _row_that_cannot_be_read(place: Place) -> Case:
    place.write_rows({"prompt": " ", "completion": "x"})
    return (), ("error config: data.path=", "row 20: the prompt is empty", "data.bad_rows=drop")


def _evaluation_rows_trained_on(place: Place) -> Case:
    return (f"data.eval_path={place.rows}",), ("error config: data.eval_path=", "all of its 20 prompts", "trained on")


def _rows_for_less_than_a_step(place: Place) -> Case:
    return ("train.batch_size=17",), ("error config: train.batch_size=17: the data has only 16", "lower it to 16")


def _data_of_the_hub_without_a_network(place: Place) -> Case:
    place.rows = Path("nobody/nothing")
    return ("data=hub",), ("error config: data.path=nobody/nothing: it is not in the cache", "set data.path")


def _model_of_the_hub_without_a_network(place: Place) -> Case:
    place.student = Path("nobody/nothing")
    return (), ("error config: model.student.path=nobody/nothing: no such folder", "unset HF_HUB_OFFLINE")


def _weights_cut_short(place: Place) -> Case:
    file = place.copy_student() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return (), ("error config: model.student.path=", "its weights do not load", "give a complete folder")


def _targets_that_fit_nothing(place: Place) -> Case:
    lora = "model.student.lora={r:4,alpha:8,dropout:0.0,targets:[nope]}"
    return (lora,), ("error config: model.student.lora.targets=['nope']: does not fit this model", "use all-linear")


CASES = [
    _teacher_of_another_family,
    _teacher_narrower_than_the_tokenizer,
    _student_without_an_end,
    _teacher_that_is_the_student,
    _row_that_cannot_be_read,
    _evaluation_rows_trained_on,
    _rows_for_less_than_a_step,
    _data_of_the_hub_without_a_network,
    _model_of_the_hub_without_a_network,
    _weights_cut_short,
    _targets_that_fit_nothing,
]


@pytest.mark.parametrize("broken", CASES, ids=lambda case: case.__name__.strip("_"))
def test_mode_check_exits_with_3_and_the_list_and_writes_nothing(place, broken):
    more, parts = broken(place)
    before = snapshot(place.folder)
    answer = call("mode=check", *place.words(*more))
    assert answer.code == 3, answer.stderr
    told = [line for line in answer.lines if line.startswith("opd: ")]
    assert len(told) == 1, told
    assert not [part for part in parts if part not in told[0]], told[0]
    assert "Traceback" not in answer.stderr
    assert snapshot(place.folder) == before
