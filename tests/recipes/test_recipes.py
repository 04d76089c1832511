"""Every recipe takes one real step: models of its models' architecture with random weights, rows of its data set's columns.

What a recipe says is left as it is but for what a tiny model on a CPU needs: paths, hardware, one step, short answers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from contract.variants import ROOT, compose
from e2e.command import call
from e2e.model_folders import build_model, build_tokenizer
from launch.commands import begin, finish

from opd.__main__ import CONF

SAMPLES = ROOT / "tests" / "data" / "samples"
RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if not path.stem.startswith("walk_"))
WALKS = sorted(path.stem for path in (CONF / "experiment").glob("walk_*.yaml"))
QUICK = (
    "onpolicy_qwen3_8b",
    "dpo_opt125m",
    "opsd_smoke",
    "gkd_llama32",
)  # one a guide, but ADPA's graphs; others: slow
FAMILIES = {
    "Qwen/Qwen3": "qwen3",
    "Qwen/Qwen2": "qwen2",
    "meta-llama/": "llama",
    "mistralai/": "mistral",
    "h2oai/h2o-danube2": "mistral",
    "openai-community/gpt2": "gpt2",
    "sshleifer/tiny-gpt2": "gpt2",
    "facebook/opt": "opt",
    "EleutherAI/pythia": "gpt_neox",
}
SAMPLE_OF = {
    "allenai/tulu-3-sft-mixture": "tulu3",
    "zwhe99/DeepMath-103K": "deepmath",
    "trl-lib/Capybara": "capybara",
    "HuggingFaceH4/deita-10k-v0-sft": "deita_10k",
    "argilla/dpo-mix-7k": "dpo_mix_7k",
    "opsd.jsonl": "opsd_combined_messages.jsonl",
}
WITHOUT_TEMPLATE = re.compile(r"Llama-3\.2-1B$|Mistral-7B-v0\.1$|danube2|gpt2|opt-|pythia")  # base models but Qwen's


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Hub id -> a folder with a tiny model of that family; made once."""
    made: dict[str, Path] = {}

    def model(hub_id: str) -> Path:
        if hub_id not in made:
            family = next(family for opening, family in FAMILIES.items() if hub_id.startswith(opening))
            # Across families the ids differ; within one they are the same, and base and instruct differ in their EOS.
            tokenizer = build_tokenizer(template=not WITHOUT_TEMPLATE.search(hub_id), reverse=family == "qwen2")
            place = tmp_path_factory.mktemp("model") / re.sub(r"\W", "_", hub_id)
            made[hub_id] = build_model(place, family, tokenizer=tokenizer, seed=len(made), positions=4096)
        return made[hub_id]

    return model


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_ARTIFACTS", str(tmp_path / "artifacts"))


def words_of(name: str, models, run: Path) -> list[str]:
    """The recipe's command, made small."""
    recipe = [f"experiment={name}", *(["data.path=opsd.jsonl"] if name.startswith("opsd_") else [])]
    raw = compose(*recipe)
    paths = {role: model["path"] for role, model in raw["model"].items() if model["path"] is not None}
    return [
        recipe[0],
        "hardware=cpu_tiny",
        "hardware.sharding=ddp",
        "hardware.teacher_placement=local",
        f"run.dir={run}",
        *(f"model.{role}.path={models(path)}" for role, path in paths.items()),
        *small("", raw),
        *(
            word
            for stage, settings in (raw.get("stages") or {}).items()
            for word in small(f"stages.{stage}.", settings)
        ),
        "train.micro_batch_size=4",
        "train.log_every_steps=1",
        "rollout.max_completion_tokens=4",
        "evaluation.batch_size=4",
    ]


def small(place: str, section: dict[str, Any]) -> list[str]:
    """The words that make a run, or a stage of it, small; ++ since a stage says only what differs."""
    data, train, words = section.get("data") or {}, section.get("train") or {}, []
    if data.get("path"):
        words.append(f"++{place}data.path={SAMPLES / SAMPLE_OF[data['path']]}")
    if data.get("eval_prompts"):
        words.append(f"++{place}data.eval_prompts=2")
    if section.get("mode", "train") == "train":
        words += [f"++{place}train.max_steps=1", f"++{place}train.batch_size={min(2, train.get('batch_size', 2))}"]
    return words


def first_step(run: Path) -> dict[str, float]:
    """The metrics of the one step, once its model was saved."""
    assert (run / "final_model" / "config.json").is_file()
    assert json.loads((run / "result.json").read_text())["steps"] == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if "train/loss" in line)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_takes_one_step(name, models, tmp_path):
    answer = call(*words_of(name, models, tmp_path / "run"))
    assert answer.code == 0, answer.stderr
    step = first_step(tmp_path / "run")
    assert step["train/tokens"] > 0
    if name == "onpolicy_tiny":  # its student is its teacher, as in the guide
        assert step["train/reverse_kl"] == step["train/grad_norm"] == 0
    else:
        assert step["train/grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral_dpo_teacher", "onpolicy_qwen3_4b"])
def test_a_recipe_with_shards_takes_one_step_in_shards(name, models, tmp_path):
    """The student's in the one, the teacher's in the other."""
    words = [word for word in words_of(name, models, tmp_path / "run") if not word.startswith("hardware")]
    done = finish(begin("opd", *words, "hardware=cpu_2rank"))
    assert done[0] == 0, done[1]
    assert first_step(tmp_path / "run")["train/tokens"] > 0
    hardware = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["hardware"]
    assert "fsdp2" in (hardware["sharding"], hardware["teacher_placement"])


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS)
def test_a_walk_takes_one_step(name, tmp_path):
    raw = compose(f"experiment={name}")
    made = [role for role, model in raw["model"].items() if model["recipe"]]
    trained = ["", *(f"stages.{stage}." for stage, told in (raw.get("stages") or {}).items() if told.get("trains"))]
    answer = call(
        f"experiment={name}",
        f"run.dir={tmp_path / 'run'}",
        *(f"model.{role}.recipe.steps=2" for role in made),
        *(f"++{place}train.{size}" for place in trained for size in ("max_steps=1", "batch_size=4", "warmup_steps=0")),
        *(f"++{place}data.limit=48" for place in trained),
        "data.eval_prompts=4",
    )
    assert answer.code == 0, answer.stderr
    assert first_step(tmp_path / "run")["train/grad_norm"] > 0
