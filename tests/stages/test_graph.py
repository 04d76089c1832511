"""The graph of stages before anything is made: which stages, in which order, at which address. No torch, no weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from contract.variants import ROOT, compose

from opd.artifacts.store import Store
from opd.errors import ConfigError
from opd.stage_graph import plan
from opd.stages import run

ADPA = ("method=adpa", "data=walk_bold")
ORDER = ["student_sft", "ref_teacher", "dpo_teacher", "responses", "scores"]


@cache
def composed(*words):
    return compose(*words)


def with_keys(raw, words):
    """The config with these keys set, as a command line would: composing anew takes longer than the planning."""
    for word in words:
        key, _, value = word.partition("=")
        *sections, leaf = key.removeprefix("+").split(".")
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = yaml.safe_load(value)
    return raw


@pytest.fixture
def planned(tmp_path):
    """The stages of these words, by name; `keys` are set after the config was composed."""

    def planned(*words, keys=()):
        raw = with_keys(copy.deepcopy(composed(*words)), keys)
        return plan(raw, raw.pop("stages", None) or {}, Store(tmp_path / "store"))

    return planned


def moved(stages, others):
    """Names of the stages whose addresses differ."""
    assert stages.keys() == others.keys()
    return {name for name in stages if stages[name].place != others[name].place}


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model's."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


# What is made, and in which order


def test_adpa_is_made_of_five_stages_each_after_those_it_needs(planned):
    stages = planned(*ADPA)
    assert list(stages) == ORDER
    assert [stage.kind for stage in stages.values()] == ["sft", "sft", "dpo", "responses", "scores"]
    places = {name: stage.place for name, stage in stages.items()}
    assert stages["dpo_teacher"].inputs == [places["ref_teacher"]]
    assert stages["responses"].inputs == [places["student_sft"]]
    assert stages["scores"].inputs == [places["dpo_teacher"], places["ref_teacher"], places["responses"]]
    assert not Path(places["scores"]).parent.exists()


def test_adpa_plus_distils_the_student_between(planned):
    stages = planned(*ADPA, "model.student.init=stage:student_dckd")
    assert list(stages) == ["student_sft", "ref_teacher", "dpo_teacher", "student_dckd", "responses", "scores"]
    assert stages["responses"].inputs == [stages["student_dckd"].place]
    assert stages["student_dckd"].inputs == [stages["dpo_teacher"].place, stages["student_sft"].place]


@pytest.mark.parametrize("method", ["dpo", "sft", "gkd"])
def test_a_method_of_one_stage_refers_to_none(planned, method):
    assert planned(f"method={method}", "data=walk_bold") == {}


def test_folders_in_the_place_of_all_stages_leave_all_out(planned, model):
    words = [f"model.student.init={model}", f"data.responses={model}", f"method.scores={model}"]
    assert planned(*ADPA, *words, f"method.dpo_teacher={model}", f"method.ref_teacher={model}") == {}


def test_a_folder_in_the_place_of_a_stage_leaves_out_what_only_that_stage_needs(planned, model):
    assert list(planned(*ADPA, f"method.scores={model}")) == ["student_sft", "responses"]
    assert list(planned(*ADPA, f"method.dpo_teacher={model}")) == ["student_sft", "ref_teacher", "responses", "scores"]
    assert list(planned(*ADPA, f"data.responses={model}")) == ["student_sft", "ref_teacher", "dpo_teacher", "scores"]


def test_stages_that_a_method_names_but_does_not_ask_are_not_made(planned):
    stages = planned(*ADPA, "method.adpa_weight=0", "method.scores=null")
    assert list(stages) == ["student_sft", "responses"]
    stages = planned(*ADPA, "method.responses=student", "method.scores=null")
    assert list(stages) == ["student_sft", "ref_teacher", "dpo_teacher"]


def test_answers_alone_need_the_student_alone(planned):
    assert list(planned(*ADPA, "mode=responses")) == ["student_sft"]


def test_scores_alone_need_both_teachers_and_the_answers(planned):
    stages = planned(*ADPA, "mode=scores", "method.scores=null")
    assert list(stages) == ["ref_teacher", "dpo_teacher", "student_sft", "responses"]


def test_the_teacher_stages_train_the_teacher_s_weights_by_its_settings(planned, model):
    words = ["model/teacher=path", f"model.teacher.path={model}", "model.teacher.dtype=bfloat16"]
    stages = planned(*ADPA, *words)
    student = stages["ref_teacher"].raw["model"]["student"]
    assert (student["path"], student["dtype"], student["recipe"]) == (str(model), "bfloat16", None)
    assert stages["ref_teacher"].raw["model"]["teacher"]["path"] is None
    assert stages["ref_teacher"].inputs == [model]
    assert stages["student_sft"].raw["model"]["student"]["path"] is None


def test_a_stage_is_as_the_run_in_what_it_does_not_set(planned):
    stages = planned(*ADPA, "run.seed=3", "train.weight_decay=0.1", "train.optimizer=sgd")
    for stage in stages.values():
        assert stage.raw["run"]["seed"] == 3 and stage.raw["train"]["weight_decay"] == 0.1
    assert stages["ref_teacher"].raw["train"]["optimizer"] == "sgd"
    assert stages["dpo_teacher"].raw["train"]["optimizer"] == "adamw"


# What an address depends on


@pytest.mark.parametrize(
    ("word", "again"),
    [
        ("stages.dpo_teacher.method.beta=0.2", {"dpo_teacher", "scores"}),
        ("stages.ref_teacher.train.learning_rate=0.001", {"ref_teacher", "dpo_teacher", "scores"}),
        ("stages.student_sft.train.max_steps=31", {"student_sft", "responses", "scores"}),
        ("stages.responses.rollout.temperature=0.5", {"responses", "scores"}),
        ("rollout.max_completion_tokens=13", {"responses", "scores"}),
        ("method.top_k=20", {"scores"}),
        ("method.chosen_distil_weight=1 method.distillation_weight=1", {"scores"}),  # then chosen answers are scored
        ("model.teacher.recipe.steps=451", {"ref_teacher", "dpo_teacher", "scores"}),
        ("model.student.recipe.steps=401", {"student_sft", "responses", "scores"}),
        ("stages.student_dckd.train.max_steps=9", set()),
        ("data.limit=512", {"dpo_teacher", "responses", "scores"}),
        ("train.weight_decay=0.1", set(ORDER)),
        ("run.seed=1", set(ORDER)),
        ("hardware.precision=bf16", set(ORDER)),
    ],
)
def test_a_changed_key_moves_its_stage_and_what_lies_downstream(planned, word, again):
    assert moved(planned(*ADPA), planned(*ADPA, keys=word.split())) == again


@pytest.mark.parametrize(
    "word",
    [
        "method.adpa_weight=0.5",
        "method.sft_on_chosen=0.5",
        "method.dpo_weight=0.5",
        "train.learning_rate=0.1",
        "train.max_steps=7",
        "train.batch_size=32",
        "train.micro_batch_size=2",
        "train.packing=true",
        "train.eval_every_steps=3",
        "train.save_every_steps=3",
        "train.keep_checkpoints=1",
        "train.log_every_steps=3",
        "train.sample_every_steps=3",
        "rollout.batch_size=3",
        "model.student.gradient_checkpointing=true",
        "evaluation.sampled=false",
        "evaluation.batch_size=7",
        "hardware.processes_per_node=2",
        "hardware.threads=2",
        "run.name=other",
        "run.dir=other",
        "run.resume=never",
        "tracking.project=other",
    ],
)
def test_what_does_not_decide_the_result_moves_nothing(planned, word):
    assert moved(planned(*ADPA), planned(*ADPA, keys=[word])) == set()


def test_other_hardware_of_the_same_kind_moves_nothing(planned):
    assert moved(planned(*ADPA), planned(*ADPA, "hardware=cpu_2rank")) == set()


def test_a_folder_counts_by_its_content_wherever_it_lies(planned, model, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")

    def with_teacher(folder):
        return planned(*ADPA, "model/teacher=path", f"model.teacher.path={folder}")

    first = with_teacher(model)
    assert moved(first, with_teacher(elsewhere)) == set()
    (elsewhere / "config.json").write_text('{"other": 1}')
    assert moved(first, with_teacher(elsewhere)) == {"ref_teacher", "dpo_teacher", "scores"}


def test_a_hub_id_counts_by_its_name_and_revision(planned):
    def with_student(*words):
        return planned(*ADPA, "model/student=path", *words)

    first = with_student("model.student.path=some/model", "model.student.revision=abc")
    assert moved(first, with_student("model.student.path=some/model", "model.student.revision=abd")) == {
        *("student_sft", "responses", "scores")
    }
    assert moved(first, with_student("model.student.path=some/other", "model.student.revision=abc")) == {
        *("student_sft", "responses", "scores")
    }


def test_changed_rows_move_every_stage(planned, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    words = ("method=adpa", "data=file", f"data.path={rows}")
    first = planned(*words)
    rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "d"}) + "\n")
    assert moved(first, planned(*words)) == set(ORDER)


def test_a_word_that_happens_to_name_a_folder_here_is_a_word(planned, tmp_path, monkeypatch):
    """data.name=walk, method.name=sft, model.attention=sdpa: only keys that name a folder are read as one."""
    first = planned(*ADPA)
    monkeypatch.chdir(tmp_path)
    for word in ("walk", "sft", "sdpa", "bold", "adamw", "cosine"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "file").write_text(word)
    assert moved(first, planned(*ADPA)) == set()


def test_the_same_stage_in_another_graph_is_the_same_artefact(planned):
    adpa, adpa_plus = planned(*ADPA), planned(*ADPA, "model.student.init=stage:student_dckd")
    shared = {name for name in adpa if adpa[name].place == adpa_plus[name].place}
    assert shared == {"student_sft", "ref_teacher", "dpo_teacher"}
    alone = planned(*ADPA, "mode=responses")
    assert alone["student_sft"].place == adpa["student_sft"].place


def test_the_code_of_a_method_decides_about_its_own_stages(planned, monkeypatch):
    from opd import lineage

    first, real = planned(*ADPA), lineage.source_version
    monkeypatch.setattr(
        lineage, "source_version", lambda paths: real(paths) + ("+" if "methods/dpo.py" in list(paths) else "")
    )
    assert moved(first, planned(*ADPA)) == {"dpo_teacher", "scores"}


# What cannot be


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["model.student.init=stage:student_stf"],
            "model.student.init=stage:student_stf: no such stage; did you mean student_sft?",
        ),
        (
            ["stages.dpo_teacher.model.student.init=stage:none"],
            "stages.dpo_teacher.model.student.init=stage:none: no such stage; ",
        ),
        (
            ["stages.dpo_teacher.model.student.init=stage:dpo_teacher"],
            "stages.dpo_teacher.model.student.init=stage:dpo_teacher: the stage needs itself; name a folder instead",
        ),
        (
            ["+stages.student_sft.model.student.init=stage:student_dckd", "model.student.init=stage:student_dckd"],
            "stages.student_sft.model.student.init=stage:student_dckd: the stage needs itself; name a folder instead",
        ),
        (["stages.dpo_teacher.method.beta=-1.0"], "stages.dpo_teacher.method.beta=-1.0: must be greater than 0"),
        (["stages.ref_teacher.train.learning_rate=0"], "stages.ref_teacher.train.learning_rate=0: must be greater"),
        (
            ["+stages.ref_teacher.train.warmup=3"],
            "stages.ref_teacher.train.warmup=3: unknown key; did you mean warmup_",
        ),
        (["+stages.ref_teacher.trian.max_steps=3"], "stages.ref_teacher.trian={'max_steps': 3}: unknown key; did you"),
        (["stages.ref_teacher.trains=both"], "stages.ref_teacher.trains='both': must be student or teacher;"),
        (["stages.responses.mode=eval"], "stages.responses.mode=eval: a stage makes something; use train, responses,"),
        (["stages.responses.mode=plan"], "stages.responses.mode=plan: a stage makes something; use train, responses,"),
        (
            ["data.responses=stage:student_sft"],
            "stages.scores.data.responses=stage:student_sft: stages.student_sft.mode is train; name a stage of mode",
        ),
        (
            ["model.student.init=stage:responses"],
            "stages.responses.model.student.init=stage:responses: the stage needs itself",
        ),
        (
            ["method.scores=stage:dpo_teacher"],
            "method.scores=stage:dpo_teacher: stages.dpo_teacher.mode is train; name a stage of mode scores",
        ),
        (["mode=scores"], "method.scores=stage:scores: mode=scores makes them itself; set method.scores=null"),
        (["model/teacher=none"], "model/teacher=none: stages.ref_teacher trains the teacher; set model/teacher=path"),
        (["stages.scores.data.responses=null"], "stages.scores.data.responses=None: "),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_a_graph_is_refused_in_one_line_that_names_the_key(planned, words, line):
    with pytest.raises(ConfigError) as refusal:
        planned(*ADPA, *words)
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)


def test_a_reference_where_no_stages_are_is_refused(planned):
    with pytest.raises(ConfigError, match=r"^model\.student\.init=stage:a: no such stage; name a folder instead"):
        planned("method=sft", "+model.student.init=stage:a")


def test_every_bad_stage_is_refused_before_anything_is_written(tmp_path):
    words = [*ADPA, f"run.dir={tmp_path / 'run'}", f"artifacts.dir={tmp_path / 'store'}"]
    with pytest.raises(ConfigError, match=r"^stages\.scores\.mode=scores method=adpa method\.top_k=None"):
        run(compose(*words, "method.top_k=null"))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_refused_before_its_stages_are_made(tmp_path):
    raw = compose(*ADPA, f"run.dir={tmp_path / 'run'}", f"artifacts.dir={tmp_path / 'store'}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty, and not a run's folder"):
        run(raw)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_graph_is_planned_and_refused_without_torch(tmp_path):
    program = (
        "import sys; from opd.__main__ import main\n"
        f"sys.argv = ['opd', *{list(ADPA)}, 'stages.dpo_teacher.method.beta=-1', 'run.dir={tmp_path}/run']\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert done.stderr.startswith("opd: stages.dpo_teacher.method.beta=-1: must be greater than 0")
