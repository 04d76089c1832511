"""Presets of public models: each names a hub id, and otherwise says what model/…=path says."""

from __future__ import annotations

import re

import pytest
from contract.variants import compose

from opd.__main__ import CONF

PRESETS = [
    (role, path.stem)
    for role in ("student", "teacher")
    for path in sorted((CONF / "model" / role).glob("*.yaml"))
    if not path.stem.startswith("walk") and path.stem not in ("path", "none")
]
LARGE = (
    "qwen3_8b",
    "qwen3_8b_base",
    "qwen2_5_7b_instruct",
    "mistral_7b",
)  # students whose activations are computed twice


@pytest.mark.parametrize(("role", "name"), PRESETS)
def test_a_preset_is_a_path_of_its_own(role, name):
    model = compose(f"model/{role}={name}")["model"][role]
    plain = compose(f"model/{role}=path", f"model.{role}.path={model['path']}")["model"][role]
    assert re.fullmatch(r"[\w-]+/[\w.-]+", model["path"])
    large = role == "student" and name in LARGE
    assert model == ({**plain, "gradient_checkpointing": True} if large else plain)


@pytest.mark.parametrize(("role", "name"), PRESETS)
def test_a_local_folder_takes_the_place_of_the_hub_id(role, name, tmp_path):
    model = compose(f"model/{role}={name}", f"model.{role}.path={tmp_path}")["model"][role]
    assert model["path"] == str(tmp_path)


def test_the_models_of_the_guides_are_there():
    small = ["qwen3_1_7b", "qwen3_4b", "qwen3_8b", "qwen2_5_0_5b_instruct", "qwen2_5_7b_instruct", "llama3_2_1b"]
    small += ["llama3_2_1b_instruct", "llama3_2_3b_instruct", "mistral_7b", "gpt2", "opt_125m", "pythia_160m"]
    small += ["pythia_410m", "tiny_gpt2"]
    bases = ["qwen3_1_7b_base", "qwen3_4b_base", "qwen3_8b_base"]
    assert {("student", name) for name in [*small, *bases]} | {
        ("teacher", name) for name in [*small, "qwen3_32b"]
    } == set(PRESETS)


def test_an_adapter_joins_a_preset():
    student = compose("model/student=qwen3_8b_base", "model/adapter=lora", "model.student.lora.r=16")["model"][
        "student"
    ]
    assert student["path"] == "Qwen/Qwen3-8B-Base" and student["lora"]["r"] == 16
