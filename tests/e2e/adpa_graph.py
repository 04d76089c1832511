"""adpa's graph of stages on models of a few thousand parameters: its words, and what its folders tell."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from contract.command import start
from safetensors.torch import load_file

STEPS = 6
TRAINED = ("ref_teacher", "student_sft", "dpo_teacher", "student_dckd")
STAGES = ["student_sft", "ref_teacher", "dpo_teacher", "responses", "scores"]
TINY = [
    "method=adpa",
    "data=walk_bold",
    *(f"model.{role}.recipe.{size}" for role in ("student", "teacher") for size in ("steps=3", "batch_size=8")),
    *(f"model.{role}.recipe.hidden_size=16" for role in ("student", "teacher")),
    "data.limit=48",
    "data.eval_prompts=8",
    "evaluation.sampled=false",
    "evaluation.divergence=false",
    "train.eval_every_steps=0",
    "rollout.batch_size=4",
    *(f"{run}train.max_steps={STEPS}" for run in ("", *(f"stages.{name}." for name in TRAINED))),
    *(f"{run}train.batch_size=8" for run in ("", *(f"stages.{name}." for name in TRAINED))),
    "train.save_every_steps=2",
    "stages.dpo_teacher.train.save_every_steps=2",
    "stages.dpo_teacher.train.eval_every_steps=0",
    "stages.ref_teacher.data.limit=32",
    "stages.student_sft.data.limit=32",
]


def words(place: Path, *more: str, store: Path | None = None) -> list[str]:
    return [*TINY, f"artifacts.dir={store or place / 'store'}", f"run.dir={place / 'run'}", *more]


def graph(place: Path, *more: str, store: Path | None = None):
    """The whole command, to its good end."""
    place.mkdir(exist_ok=True)
    return start(words(place, *more, store=store), place / "log").finish()


def told(place: Path) -> dict[str, dict]:
    """The stages of the run, as its stages.json has them."""
    return {stage["stage"]: stage for stage in json.loads((place / "run" / "stages.json").read_text())}


def made(place: Path) -> list[str]:
    """The stages that the last command made."""
    return [name for name, stage in told(place).items() if not stage["reused"]]


def result_of(place: Path, name: str) -> Path:
    """What a reference to the stage stands for."""
    folder = place / "store" / told(place)[name]["address"]
    return folder / "final_model" if (folder / "final_model").is_dir() else folder


def assert_close(run: Path, other: Path) -> None:
    """The weights of two runs, to what another order of sums does."""
    ours, theirs = (load_file(folder / "final_model" / "model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
