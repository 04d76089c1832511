"""The main job: `python -m opd` trains the embedded models, distils one into the other, and reports."""

from __future__ import annotations

import json

import pytest

from e2e.command import Answer, call

# Models that are trained in a second, and five steps of distillation.
MINI = [
    "model.student.recipe.steps=3",
    "model.student.recipe.batch_size=8",
    "model.teacher.recipe.steps=4",
    "model.teacher.recipe.batch_size=8",
    "model.teacher.recipe.hidden_size=32",
    "data.limit=32",
    "data.eval_prompts=16",
    "train.max_steps=5",
    "train.batch_size=8",
    "train.warmup_steps=1",
]


def run_walk(folder, artifacts, *more: str) -> tuple[Answer, dict]:
    """The mini job in this folder; its answer and its result."""
    answer = call(f"run.dir={folder}", f"artifacts.dir={artifacts}", *MINI, *more)
    result = folder / "result.json"
    return answer, json.loads(result.read_text()) if result.is_file() else {}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def first(tmp_path_factory, artifacts):
    """The first run of the module, for which the models are made."""
    return run_walk(tmp_path_factory.mktemp("first") / "run", artifacts)


@pytest.fixture
def walk(tmp_path, artifacts, first):
    """A later run, which finds the models of the first."""
    return lambda *more: run_walk(tmp_path / "run", artifacts, *more)


def kept(artifacts, role):
    return {path.name for path in artifacts.glob(f"walk-{role}-*") if path.is_dir()}


def test_the_mini_job_trains_both_models_and_measures_the_student(first, artifacts):
    answer, result = first
    assert answer.code == 0, answer.stderr
    assert "walk student" in answer.stderr
    assert "walk teacher" in answer.stderr
    assert len(kept(artifacts, "student")) == len(kept(artifacts, "teacher")) == 1
    wanted = {"success_greedy", "success_sampled", "optimal_greedy", "forward_kl", "reverse_kl", "nll"}
    assert wanted <= result["after"].keys()
    assert any("recovery" in name for name in result["after"])
    assert result["steps"] == 5


def test_a_methods_own_loss_of_held_out_rows_leaves_the_evaluations_numbers_alone(first, walk):
    """Off-policy gkd measures a forward KL of its own, on the data's answers; the name means the models' own."""
    answer, result = walk("method.lmbda=0", "train.batch_size=8")
    assert answer.code == 0, answer.stderr
    assert "loss" in result["before"] and "loss" not in first[1]["before"]
    assert first[1]["before"].items() <= result["before"].items()


@pytest.mark.parametrize("method", ["gkd", "sft", "reverse_kl"])
def test_kept_models_are_reused_and_the_same_run_gives_the_same_numbers(first, walk, artifacts, method):
    before = kept(artifacts, "student") | kept(artifacts, "teacher")
    answer, result = walk(f"method={method}", "train.batch_size=8")
    assert answer.code == 0, answer.stderr
    assert "is trained once" not in answer.stdout
    assert "walk student" not in answer.stderr
    assert kept(artifacts, "student") | kept(artifacts, "teacher") == before
    # A method that learns from the data alone is also measured by its own loss.
    assert first[1]["before"].items() <= result["before"].items()
    assert (result["after"] == first[1]["after"]) == (method == "gkd")


def test_another_seed_has_another_student_and_the_same_teacher(walk, artifacts):
    students, teachers = kept(artifacts, "student"), kept(artifacts, "teacher")
    walk("run.seed=1")
    assert len(kept(artifacts, "student") - students) == 1
    assert kept(artifacts, "teacher") == teachers


def test_a_changed_recipe_has_another_address(walk, artifacts):
    teachers = kept(artifacts, "teacher")
    walk("model.teacher.recipe.detour_probability=0.3")
    assert len(kept(artifacts, "teacher") - teachers) == 1


@pytest.mark.slow
def test_a_making_that_is_killed_leaves_nothing_that_could_be_taken_for_a_model(walk, artifacts, monkeypatch):
    from opd import embedded

    before = kept(artifacts, "student")

    def save_half_and_die(folder, *rest):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_train", save_half_and_die)
        answer, _ = walk("run.seed=2")
    assert answer.code == 130
    assert {name for name in kept(artifacts, "student") if not name.endswith(".partial")} == before
    answer, _ = walk("run.seed=2")
    assert answer.code == 0, answer.stderr
    assert not list(artifacts.glob("*.partial"))


@pytest.mark.slow
def test_the_main_job_lifts_the_student_and_brings_it_nearer_to_its_teacher(tmp_path):
    answer = call(f"run.dir={tmp_path / 'run'}", f"artifacts.dir={tmp_path / 'artifacts'}", "run.seed=0")
    assert answer.code == 0, answer.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["success_greedy"] >= 0.90
    assert after["success_greedy"] >= before["success_greedy"] + 0.05
    assert after["success_sampled"] > before["success_sampled"]
    recoveries = [name for name in before if "recover" in name]
    assert recoveries
    assert all(after[name] > before[name] for name in recoveries)
    assert after["forward_kl"] <= 0.7 * before["forward_kl"]
    assert after["reverse_kl"] <= 0.7 * before["reverse_kl"]
