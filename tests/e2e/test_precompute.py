"""What is made before training and read instead of a model: answers, kept scores, a reference's log-probabilities."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e2e.command import ENVIRONMENT, call, shell
from e2e.model_folders import CHATML, build_model, write_rows
from e2e.pair_rows import LORA, pair_run, read_metrics, write_pairs
from opd.preflight import Checks

TWO_RANKS = "hardware=cpu_2rank"
FOLDERS = ("model.student.init=null", "data.max_completion_length=20")  # adpa without its stages


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("other") / "model", seed=2)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


def run(folder, *words, **settings):
    """The finished run's folder."""
    answer = (shell if TWO_RANKS in words else call)(*words, **settings)
    assert answer.code == 0, answer.stderr
    return folder


def assert_same_training(one, other):
    for mine, theirs in zip(read_metrics(one), read_metrics(other), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    weights = [load_file(folder / "final_model" / "model.safetensors") for folder in (one, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)


# The reference of dpo.


@pytest.mark.parametrize("lora", [(), (LORA,)])
def test_a_precomputed_reference_changes_nothing_but_the_memory(tmp_path, pairs, student, lora):
    words = ("method=dpo", "train.learning_rate=0.01", "train.eval_every_steps=1", *lora)
    live = run(tmp_path / "live", *pair_run(tmp_path / "live", pairs, student, None, *words))
    kept_words = (*words, "method.precompute_reference=true")
    kept = run(tmp_path / "kept", *pair_run(tmp_path / "kept", pairs, student, None, *kept_words))
    assert_same_training(live, kept)
    assert read_metrics(live)[-1]["eval/reward_margin"] != 0


def load(*words):
    """Everything that a run loads before it begins, the precomputed reference included."""
    from contract.variants import compose
    from hydra.core.global_hydra import GlobalHydra

    from opd import pipeline
    from opd.conditions import validated

    GlobalHydra.instance().clear()
    config = validated(compose(*words))
    return pipeline._load(config, Checks(config))


@pytest.mark.parametrize(("precompute", "models"), [("false", 2), ("true", 1)])
def test_a_precomputed_reference_leaves_one_model_in_memory(tmp_path, pairs, student, precompute, models):
    words = ("method=dpo", f"method.precompute_reference={precompute}")
    loaded = load(*pair_run(tmp_path / "run", pairs, student, None, *words))
    gc.collect()
    mine = next(loaded.student.parameters())
    same = [one for one in gc.get_objects() if type(one) is type(loaded.student) and one.name_or_path == str(student)]
    assert any(next(one.parameters()) is mine for one in same)
    assert len(same) == models


def kept_logprobs(artifacts):
    return {path.name for path in artifacts.glob("logprobs-*") if path.is_dir()}


def test_a_precomputed_reference_is_found_again_and_made_anew_when_its_model_or_rows_change(tmp_path, pairs, student):
    artifacts = tmp_path / "artifacts"

    def new_after(*words, data=pairs, model=student):
        before = kept_logprobs(artifacts)
        words = ("method=dpo", "method.precompute_reference=true", *words)
        load(*pair_run(tmp_path / "run", data, model, None, *words))
        return len(kept_logprobs(artifacts) - before)

    assert new_after() == 1
    # What does not decide the log-probabilities finds them; so does another split of the same rows.
    for same in ("method.beta=0.5", "train.learning_rate=0.1", "train.batch_size=2", "run.seed=3", LORA):
        assert new_after(same) == 0, same
    assert new_after(model=Path(shutil.copytree(student, tmp_path / "copied"))) == 0
    assert new_after(data=Path(shutil.copy(pairs, tmp_path / "copied.jsonl"))) == 0
    # What does makes them anew.
    assert new_after(model=build_model(tmp_path / "trained", seed=5)) == 1
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    assert new_after(f"model.student.chat_template={template}") == 1
    assert new_after("data.max_completion_length=6") == 1
    assert new_after(data=write_pairs(tmp_path / "fewer.jsonl", 16)) == 1
    assert new_after("model.student.dtype=bfloat16") == 1
    assert new_after("hardware.precision=bf16") == 1


@pytest.mark.slow
def test_the_reference_of_an_adapter_is_made_anew_when_its_base_changes(tmp_path, pairs, student):
    base = Path(shutil.copytree(student, tmp_path / "base"))
    first = run(tmp_path / "first", *pair_run(tmp_path / "first", pairs, base, None, "method=dpo", LORA))
    words = ("method=dpo", "method.precompute_reference=true")
    adapter = first / "final_adapter"
    run(tmp_path / "a", *pair_run(tmp_path / "a", pairs, adapter, None, *words))
    assert len(kept_logprobs(tmp_path / "artifacts")) == 1
    run(tmp_path / "b", *pair_run(tmp_path / "b", pairs, adapter, None, *words))
    assert len(kept_logprobs(tmp_path / "artifacts")) == 1
    shutil.copy(build_model(tmp_path / "other", seed=6) / "model.safetensors", base / "model.safetensors")
    run(tmp_path / "c", *pair_run(tmp_path / "c", pairs, adapter, None, *words))
    assert len(kept_logprobs(tmp_path / "artifacts")) == 2
    assert read_metrics(tmp_path / "c")[0]["eval/reward_margin"] == pytest.approx(0, abs=1e-5)


# Kept scores of teachers.


def test_dckd_by_kept_scores_is_dckd_by_the_teacher_itself(tmp_path, pairs, student, teacher):
    words = ("method=dckd", "method.top_k=8", "train.eval_every_steps=1")
    scores = run(tmp_path / "scores", *pair_run(tmp_path / "scores", pairs, student, teacher, *words, "mode=scores"))
    # Another split of the rows: whoever is held out, the scores are there.
    words += ("run.seed=3", "evaluation.divergence=false")
    live = run(tmp_path / "live", *pair_run(tmp_path / "live", pairs, student, teacher, *words))
    kept = f"method.dpo_teacher={scores}"
    cached = run(tmp_path / "cached", *pair_run(tmp_path / "cached", pairs, student, None, *words, kept))
    assert_same_training(live, cached)
    assert read_metrics(cached)[0]["eval/loss_rejected_fkl"] > 0


@pytest.fixture(scope="module")
def answered(tmp_path_factory, pairs, student, artifacts):
    folder = tmp_path_factory.mktemp("answered") / "responses"
    sampled = ("mode=responses", "method=sft", "rollout.temperature=1.0", f"artifacts.dir={artifacts}")
    return run(folder, *pair_run(folder, pairs, student, None, *sampled))


@pytest.fixture(scope="module")
def adpa_words(answered, teacher, other_teacher):
    teachers = (f"method.dpo_teacher={teacher}", f"method.ref_teacher={other_teacher}", "method.scores=null")
    return ("method=adpa", "method.top_k=8", *FOLDERS, f"data.responses={answered}", *teachers)


@pytest.fixture(scope="module")
def adpa_scores(tmp_path_factory, pairs, student, adpa_words, artifacts):
    folder = tmp_path_factory.mktemp("scored") / "scores"
    more = ("mode=scores", f"artifacts.dir={artifacts}")
    return run(folder, *pair_run(folder, pairs, student, None, *adpa_words, *more))


def test_adpa_by_kept_scores_is_adpa_by_both_teachers(tmp_path, pairs, student, adpa_words, adpa_scores):
    words = (*adpa_words, "evaluation.divergence=false")
    live = run(tmp_path / "live", *pair_run(tmp_path / "live", pairs, student, None, *words))
    kept = (*words, f"method.scores={adpa_scores}", "method.dpo_teacher=null", "method.ref_teacher=null")
    cached = run(tmp_path / "cached", *pair_run(tmp_path / "cached", pairs, student, None, *kept))
    assert_same_training(live, cached)
    assert read_metrics(live)[1]["train/expected_advantage"] != 0


def test_scored_tokens_are_counted_once_a_teacher(adpa_scores, answered):
    answers = [json.loads(line) for line in (answered / "responses.jsonl").read_text().splitlines()]
    tokens = sum(len(answer["completion_ids"]) for answer in answers)
    assert json.loads((adpa_scores / "result.json").read_text())["ledger"] == {"teacher_scored_tokens": 2 * tokens}
    sampled = json.loads((answered / "result.json").read_text())["ledger"]
    assert sampled == {"student_sampled_tokens": tokens}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("method.top_k=9",), "method.top_k=9: method.scores={scores} holds the 8 likeliest ids; set it to 8"),
        (("method.top_k=null",), "method.top_k=None: method.scores={scores} holds the 8 likeliest ids"),
        (("data.max_completion_length=3",), "method.scores={scores}: has no scores of the response completion of row"),
        (("data.responses={empty}",), "data.responses={empty}: no responses.jsonl lies there; make it with"),
        (("method.scores={empty}",), "method.scores={empty}: holds no kept scores"),
        (("method.scores={missing}",), "method.scores={missing}: "),
        (("method.scores=null", "method.dpo_teacher=null"), "model/teacher=none: method=adpa needs a teacher"),
        (("method.scores=null", "method.ref_teacher={missing}"), "method.ref_teacher={missing}: no such folder"),
        (("method.scores=null", "method.ref_teacher=null"), "method.ref_teacher=None: advantages are relative to it"),
        (("data.responses=null",), "data.responses=None: method=adpa reads the student's stored answers"),
        (("mode=scores",), "method.scores={scores}: holds kept scores, and mode=scores asks a model"),
        (("mode=scores", "method=sft"), "mode=scores method=sft method.top_k=None: keeps the teachers' likeliest ids"),
    ],
)
def test_scores_that_do_not_fit_are_refused_before_a_weight_is_loaded(
    tmp_path, pairs, student, adpa_words, adpa_scores, words, told
):
    weightless = Path(shutil.copytree(student, tmp_path / "weightless"))
    (weightless / "model.safetensors").unlink()
    places = {"scores": adpa_scores, "empty": tmp_path / "empty", "missing": tmp_path / "missing"}
    places["empty"].mkdir()
    more = [word.format(**places) for word in (f"method.scores={adpa_scores}", *words)]
    if "method=sft" in words:
        command = pair_run(tmp_path / "run", pairs, weightless, None, *words)
    else:
        command = pair_run(tmp_path / "run", pairs, weightless, None, *adpa_words, *more)
    answer = call(*command)
    assert answer.code == 2
    assert len(answer.lines) == 1
    assert answer.stderr.startswith(f"opd: {told.format(**places)}"), answer.stderr
    assert not (tmp_path / "run").exists()


def test_scores_of_another_method_are_refused(tmp_path, pairs, student, teacher, adpa_words):
    dckd = ("method=dckd", "method.top_k=8", "mode=scores")
    scores = run(tmp_path / "scores", *pair_run(tmp_path / "scores", pairs, student, teacher, *dckd))
    answer = call(*pair_run(tmp_path / "run", pairs, student, None, *adpa_words, f"method.scores={scores}"))
    assert answer.code == 2
    assert "holds scores of dpo_teacher, not of ref_teacher; make them with mode=scores" in answer.stderr


@pytest.mark.parametrize("key", ["method.dpo_teacher", "method.ref_teacher"])
def test_a_named_teacher_with_another_tokenizer_is_refused_by_its_key(tmp_path, pairs, student, adpa_words, key):
    from e2e.model_folders import build_tokenizer

    stranger = build_model(tmp_path / "stranger", tokenizer=build_tokenizer(reverse=True))
    (stranger / "model.safetensors").unlink()
    answer = call(*pair_run(tmp_path / "run", pairs, student, None, *adpa_words, f"{key}={stranger}"))
    assert answer.code == 2
    assert answer.stderr.startswith(f"opd: {key}={stranger}: its tokenizer is not the student's")


def test_named_teachers_of_other_widths_are_compared_over_the_shared_ids(tmp_path, pairs, adpa_words, answered):
    wide = [build_model(tmp_path / name, width=width) for name, width in (("a", 304), ("b", 320), ("s", 310))]
    more = (f"method.dpo_teacher={wide[0]}", f"method.ref_teacher={wide[1]}", "method.top_k=null")
    run(tmp_path / "run", *pair_run(tmp_path / "run", pairs, wide[2], None, *adpa_words, *more))


# Answers, and the work of two ranks.


def responses(folder):
    return (folder / "responses.jsonl").read_text()


def test_answers_cover_every_training_prompt_in_order_and_end_in_their_stop_token(answered, student):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    records = [json.loads(line) for line in responses(answered).splitlines()]
    rows = [record["row"] for record in records]
    assert rows == sorted(set(rows)) and len(rows) == 16
    for record in records:
        assert (record["completion_ids"][-1] == tokenizer.eos_token_id) == record["finished"]
        assert tokenizer.decode(record["prompt_ids"]) == record["prompt"]


@pytest.mark.slow
def test_killed_answering_goes_on_where_it_was_and_answers_the_same(tmp_path, student):
    rows = write_rows(tmp_path / "rows.jsonl")
    slowly = ("mode=responses", "method=sft", "rollout.batch_size=1", "rollout.max_completion_tokens=90")
    slowly += ("rollout.temperature=1.0",)
    whole = run(tmp_path / "whole", *pair_run(tmp_path / "whole", rows, student, None, *slowly))
    folder = tmp_path / "killed"
    words = pair_run(folder, rows, student, None, *slowly)
    process = subprocess.Popen([sys.executable, "-m", "opd", *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    answered = 0
    while answered < 3 and process.poll() is None:
        time.sleep(0.005)
        answered = sum(part.read_text().count("\n") for part in folder.glob(".responses-0*.jsonl"))
    process.kill()
    process.wait(timeout=30)
    assert process.returncode == -signal.SIGKILL
    (part,) = folder.glob(".responses-0*.jsonl")
    done = part.read_text().count("\n")
    assert 3 <= done < 16
    with part.open("a") as file:
        file.write('{"row": 99, "half a li')
    answer = call(*words)
    assert answer.code == 0, answer.stderr
    assert f"{done} of 16 responses are there already" in (folder / "training.log").read_text()
    assert responses(folder) == responses(whole)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_two_ranks_answer_and_score_what_one_does(tmp_path, pairs, student, adpa_words, answered, adpa_scores):
    sampled = ("mode=responses", "method=sft", "rollout.temperature=1.0", TWO_RANKS, "train.micro_batch_size=4")
    two = run(tmp_path / "responses", *pair_run(tmp_path / "responses", pairs, student, None, *sampled))
    assert responses(two) == responses(answered)
    assert (
        json.loads((two / "result.json").read_text())["ledger"]
        == (json.loads((answered / "result.json").read_text())["ledger"])
    )
    scored = (*adpa_words, "mode=scores", TWO_RANKS, "train.micro_batch_size=4")
    two = run(tmp_path / "scores", *pair_run(tmp_path / "scores", pairs, student, None, *scored))
    for name in ("scores.safetensors", "scores.json"):
        assert (two / name).read_bytes() == (adpa_scores / name).read_bytes()
    assert (
        json.loads((two / "result.json").read_text())["ledger"]
        == (json.loads((adpa_scores / "result.json").read_text())["ledger"])
    )
    assert not [path for path in two.glob(".*") if path.name != ".ranks"]


@pytest.mark.slow
def test_two_ranks_keep_the_reference_that_one_does(tmp_path, pairs, student, monkeypatch):
    words = ("method=dpo", "method.precompute_reference=true", "train.micro_batch_size=4")
    one = run(tmp_path / "one", *pair_run(tmp_path / "one", pairs, student, None, *words))
    (kept,) = (tmp_path / "artifacts").glob("logprobs-*/scores.safetensors")
    content = kept.read_bytes()
    shutil.rmtree(tmp_path / "artifacts")
    env = {"OPD_ARTIFACTS": os.environ["OPD_ARTIFACTS"]}
    two = run(tmp_path / "two", *pair_run(tmp_path / "two", pairs, student, None, *words, TWO_RANKS), env=env)
    assert kept.read_bytes() == content
    for mine, theirs in zip(read_metrics(one), read_metrics(two), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
