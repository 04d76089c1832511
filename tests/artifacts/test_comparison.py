"""Runs side by side: the numbers by hand, the intervals by theory, and what may not be compared refused."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from e2e.command import ROOT, call, shell

from opd.artifacts.comparison import compare, write_comparison
from opd.artifacts.comparison_statistics import RESAMPLES, interval, read_columns
from opd.artifacts.console import note, start_logging
from opd.artifacts.run_record import read_run
from opd.compare import main
from opd.errors import ConfigError
from opd.evaluate import row_scores

Rows = dict[int, dict[str, Any]]


def with_keys(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        *sections, leaf = key.split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return config


def make_run(
    folder: Path,
    method: str = "gkd",
    seed: int = 0,
    *,
    rows: Rows | None = None,
    after: dict[str, float] | None = None,
    result: dict[str, Any] | None = None,
    before: float = 0.25,
    **overrides: Any,
) -> Path:
    """A finished run's folder. `rows` give its scores by row, and its `after` where that is not given."""
    rows = {row: {"success": float(row % 2)} for row in range(8)} if rows is None else rows
    means = {}
    for name in {name for scores in rows.values() for name in scores if not name.endswith("_tokens")}:
        pairs = [(float(s[name]), s.get(f"{name}_tokens", 1)) for s in rows.values() if name in s]
        means[name] = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    config = with_keys(
        {
            "mode": "train",
            "run": {"name": method, "dir": str(folder), "seed": seed},
            "method": {"name": method},
            "data": {"name": "walk", "eval_prompts": 8, "limit": 512},
            "hardware": {"name": "cpu_tiny"},
            "train": {"learning_rate": 0.001},
        },
        {key.replace("__", "."): value for key, value in overrides.items()},
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    told = {"before": {"success": before}, "after": after or means, "seconds": 20.0, "train_seconds": 10.0}
    told |= {"tokens": 1000, "steps": 5} | (result or {})
    (folder / "result.json").write_text(json.dumps(told))
    (folder / "provenance.json").write_text("{}")
    (folder / "samples.jsonl").write_text("")
    curve = [{"step": 0, "eval/success": before}, {"step": 5, "train/tokens": 200, "eval/success": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    lines = [json.dumps({"row": row, **scores}) + "\n" for row, scores in rows.items()]
    (folder / "scores-after.jsonl").write_text("".join(lines))
    return folder


def table(comparison, title: str) -> dict[str, list[str]]:
    """{setting: cells} of the table whose title begins so."""
    (found,) = [table for table in comparison.tables if table.title.startswith(title)]
    return {row[0]: row[1:] for row in found.rows}


def successes(values: list[float]) -> Rows:
    return {row: {"success": value} for row, value in enumerate(values)}


# Means, spreads, costs


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds(tmp_path):
    for seed, value in enumerate((0.5, 0.7, 0.9)):
        make_run(tmp_path / f"gkd{seed}", seed=seed, rows=successes([value]), before=0.1 * seed)
    comparison = compare([tmp_path])
    assert table(comparison, "Metrics") == {
        "before training": ["3", "0.100 ± 0.100"],
        "gkd": ["3", "0.700 ± 0.200"],
    }


def test_one_seed_has_no_spread_and_that_is_said(tmp_path):
    comparison = compare([make_run(tmp_path / "run", rows=successes([0.0, 1.0]))])
    assert table(comparison, "Metrics")["gkd"] == ["1", "0.500"]
    assert "one seed only: gkd; the spread over seeds is unknown" in comparison.notes
    assert not comparison.differences


def test_cost_is_read_from_the_ledger_and_a_dash_where_there_is_none(tmp_path):
    ledger = {
        "student_trained_tokens": 1100,
        "student_sampled_tokens": 20_000_000,
        "teacher_sampled_tokens": 0,
        "teacher_scored_tokens": 40,
    }
    make_run(tmp_path / "gkd0", result={"ledger": ledger})
    make_run(tmp_path / "gkd1", seed=1, result={"ledger": {**ledger, "teacher_scored_tokens": 44}})
    make_run(tmp_path / "sft", "sft")
    costs = table(compare([tmp_path]), "Cost")
    assert costs["gkd"] == ["5", "1,100", "20 M", "0", "42 ± 3", "10.0 ± 0.0", "20.0 ± 0.0"]
    assert costs["sft"] == ["5", "1,000", "—", "—", "—", "10.0", "20.0"]


def add_stages(folder: Path, beta: float = 0.3, *, seed: int = 0, **seconds: float) -> None:
    """What a graph leaves in the run's folder: `seconds` by stage, and folders named after the seed."""
    stages = [
        {
            "stage": name,
            "address": f"dpo-{name}{beta}{seed}",
            "reused": reused,
            "seconds": 0.0 if reused else made + 1.0,
            "made_in_seconds": made,
            "settings": {
                "method": {"beta": beta},
                "train": {"eval_every_steps": seed},
                "model": {"student": {"recipe": {"seed": seed}}},
            },
        }
        for reused, (name, made) in enumerate(seconds.items())
    ]
    (folder / "stages.json").write_text(json.dumps(stages))


def test_the_seconds_of_earlier_stages_have_a_column_of_their_own_also_where_they_were_reused(tmp_path):
    add_stages(make_run(tmp_path / "adpa", "adpa"), a=30.0, b=12.5)
    make_run(tmp_path / "sft", "sft")
    costs = table(compare([tmp_path]), "Cost")
    assert costs["adpa"][-3:] == ["10.0", "20.0", "42.5"]
    assert costs["sft"][-1] == "—"


def test_runs_on_other_stages_are_one_setting_if_only_the_seed_of_the_stages_differs(tmp_path):
    for beta in (0.1, 0.3):
        for seed in (0, 1):
            where = f"store/dpo-teacher{beta}{seed}/final_model"
            run = make_run(tmp_path / f"{beta}-{seed}", "adpa", seed, **{"method.dpo_teacher": where})
            add_stages(run, beta, seed=seed, teacher=30.0)
    costs = table(compare([tmp_path]), "Cost")
    assert sorted(costs) == ["adpa beta=0.1", "adpa beta=0.3"]


@pytest.mark.parametrize(("tokens", "told"), [(1100, False), (1101, True)])
def test_budgets_more_than_a_tenth_apart_are_told(tmp_path, tokens, told):
    make_run(tmp_path / "sft", "sft")
    make_run(tmp_path / "gkd", result={"tokens": tokens})
    notes = [note for note in compare([tmp_path]).notes if note.startswith("not the same budget")]
    assert bool(notes) == told
    if told:
        assert notes == ["not the same budget: 1,000 student tokens trained in sft, 1,101 in gkd (+10 %)"]


def test_students_that_began_differently_have_rows_of_their_own(tmp_path):
    make_run(tmp_path / "sft", "sft", before=0.25)
    make_run(tmp_path / "gkd", before=0.5)
    rows = table(compare([tmp_path]), "Metrics")
    assert rows["before: gkd"] == ["1", "0.500"] and rows["before: sft"] == ["1", "0.250"]


# Intervals


def test_the_interval_of_a_mean_difference_agrees_with_the_normal_approximation():
    rng, n = np.random.default_rng(7), 3000
    base = {row: (value, 1.0) for row, value in enumerate(rng.normal(size=n))}
    ours = {row: (base[row][0] + shift, 1.0) for row, shift in enumerate(rng.normal(0.3, 2.0, size=n))}
    shifts = np.array([ours[row][0] - base[row][0] for row in range(n)])
    found = interval({0: ours}, {0: base})
    half = 1.959964 * shifts.std(ddof=1) / math.sqrt(n)
    assert found.estimate == pytest.approx(shifts.mean(), rel=1e-12)
    # The bound of 2000 resamples has a standard error of about 0.06 of a standard error of the mean.
    assert found.low == pytest.approx(shifts.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(shifts.mean() + half, abs=0.1 * half)
    assert found.prompts == n and RESAMPLES == 2000


def test_a_metric_in_tokens_is_a_ratio_and_its_interval_agrees_with_the_delta_method():
    rng, n = np.random.default_rng(3), 3000
    weights = rng.integers(1, 20, size=n).astype(float)
    values = rng.normal(1.0, 0.5, size=n) + 0.05 * weights
    found = interval({0: {row: (values[row], weights[row]) for row in range(n)}})
    ratio = (values * weights).sum() / weights.sum()
    half = 1.959964 * np.std(weights * (values - ratio)) / weights.mean() / math.sqrt(n)
    assert found.estimate == pytest.approx(ratio, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((ratio - half, ratio + half), abs=0.1 * half)


def test_runs_that_are_identical_differ_by_zero_in_zero_to_zero(tmp_path):
    rows = {row: {"success": row / 7, "loss": row / 3, "loss_tokens": 1 + row % 5} for row in range(50)}
    make_run(tmp_path / "sft", "sft", rows=rows)
    make_run(tmp_path / "gkd", rows=rows)
    found = compare([tmp_path]).differences["gkd"]
    assert found.keys() == {"success", "loss"}
    for difference in found.values():
        assert (difference.estimate, difference.low, difference.high) == (0, 0, 0)
        assert difference.same_sign == 1


def test_the_order_of_the_lines_does_not_matter(tmp_path):
    random.seed(1)
    ours, theirs = ([random.random() for _ in range(40)] for _ in range(2))
    make_run(tmp_path / "sft", "sft", rows=successes(theirs))
    file = make_run(tmp_path / "gkd", rows=successes(ours)) / "scores-after.jsonl"
    ordered = compare([tmp_path]).differences
    lines = file.read_text().splitlines(keepends=True)
    random.shuffle(lines)
    file.write_text("".join(lines))
    assert compare([tmp_path]).differences == ordered


def test_seeds_are_averaged_before_prompts_are_drawn(tmp_path):
    # What one seed gains on a prompt the other loses on it: no prompt differs on average, whichever are drawn.
    gains = [row / 64 - 0.5 for row in range(64)]
    for seed, sign in enumerate((1, -1)):
        make_run(tmp_path / f"sft{seed}", "sft", seed, rows=successes([0.5] * 64))
        make_run(tmp_path / f"gkd{seed}", seed=seed, rows=successes([0.5 + sign * gain for gain in gains]))
    found = compare([tmp_path]).differences["gkd"]["success"]
    assert (found.estimate, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_only_seeds_that_both_have_are_paired_and_their_signs_counted(tmp_path):
    for seed, value in enumerate((0.0, 0.0, 1.0)):
        make_run(tmp_path / f"sft{seed}", "sft", seed, rows=successes([value] * 4))
    for seed in (1, 2, 3):
        make_run(tmp_path / f"gkd{seed}", seed=seed, rows=successes([0.75] * 4))
    comparison = compare([tmp_path])
    found = comparison.differences["gkd"]["success"]
    assert found.by_seed == (0.75, -0.25) and found.estimate == 0.25
    assert found.same_sign == 1 and found.sd_over_seeds == pytest.approx(1 / math.sqrt(2))
    assert any(note.startswith("not the same seeds") for note in comparison.notes)


def test_the_text_says_what_the_interval_covers_and_what_not(tmp_path):
    make_run(tmp_path / "sft", "sft")
    make_run(tmp_path / "gkd")
    text = " ".join(compare([tmp_path]).text.split())
    assert "percentile bootstrap over the evaluation prompts (8), 2000 resamples, generator seed 0" in text
    assert "It does not cover the seeds (n = 1)" in text


def test_a_score_that_is_not_a_number_gives_no_interval_and_no_verdict(tmp_path):
    make_run(tmp_path / "sft", "sft")
    rows = {row: {"success": "nan" if row == 3 else 1.0} for row in range(8)}
    make_run(tmp_path / "gkd", rows=rows, after={"success": "nan"})
    row = table(compare([tmp_path]), "Differences")["success ↑"]
    assert row == ["gkd", "nan", "[nan, nan]", "—", "0 of 1", "unclear"]


# What is one setting, and what it is called


def test_seed_folder_name_and_hardware_make_no_setting(tmp_path):
    make_run(tmp_path / "a", seed=0, run__name="one", tracking__backend="none", artifacts__dir="here")
    make_run(tmp_path / "b", seed=1, run__name="two", hardware__name="a800x2", train__micro_batch_size=2)
    comparison = compare([tmp_path])
    assert [(setting.label, setting.seeds) for setting in comparison.settings] == [("gkd", [0, 1])]
    assert "not the same hardware: cpu_tiny, a800x2; their seconds do not compare" in comparison.notes


def test_a_recipe_that_follows_the_seed_makes_no_setting_and_one_that_does_not_makes_one(tmp_path):
    def run(name, seed, teacher):
        recipes = {"model__student__recipe__seed": seed, "model__teacher__recipe__seed": teacher}
        make_run(tmp_path / name, seed=seed, model__student__path=f"/made/{seed}", **recipes)

    run("a", 0, 0), run("b", 1, 0), run("c", 1, 5)
    settings = compare([tmp_path]).settings
    assert [(setting.label, setting.seeds) for setting in settings] == [("gkd seed=0", [0, 1]), ("gkd seed=5", [1])]


def test_labels_name_the_method_and_the_keys_in_which_its_settings_differ(tmp_path):
    for number, (beta, lmbda) in enumerate([(1.0, 0.5), (0.5, 0.5), (0.5, 1)]):
        make_run(tmp_path / str(number), method__beta=beta, method__lmbda=lmbda, method__seq_kd=False)
    make_run(tmp_path / "sft", "sft", train__learning_rate=0.5)
    labels = [setting.label for setting in compare([tmp_path]).settings]
    assert labels == ["gkd beta=0.5 lmbda=0.5", "gkd beta=0.5 lmbda=1", "gkd beta=1 lmbda=0.5", "sft"]
    assert "train.learning_rate=0.5" in table(compare([tmp_path]), "Settings")["sft"][1]


def test_keys_of_one_name_keep_as_much_of_their_place_as_tells_them_apart(tmp_path):
    for number, (student, teacher) in enumerate([("s/a", "t/x"), ("s/b", "t/x"), ("s/a", "t/y")]):
        make_run(tmp_path / str(number), model__student__path=student, model__teacher__path=teacher)
    labels = [setting.label for setting in compare([tmp_path]).settings]
    assert labels == [f"gkd student.path={s} teacher.path={t}" for s, t in ("ax", "ay", "bx")]


def test_a_long_label_leaves_out_what_most_settings_have(tmp_path):
    keys = ("lmbda", "seq_kd", "kd_temperature", "loss_normalization")
    usual = {"lmbda": 1, "seq_kd": False, "kd_temperature": 1, "loss_normalization": "token"}
    changes = [{}, {"lmbda": 0}, {"seq_kd": True}, {"kd_temperature": 2}, {"loss_normalization": "sequence"}]
    for number, change in enumerate(changes):
        chosen = usual | change
        make_run(tmp_path / str(number), **{f"method__{key}": chosen[key] for key in keys})
    labels = {setting.label for setting in compare([tmp_path]).settings}
    assert labels == {
        "gkd", "gkd lmbda=0", "gkd seq_kd=true", "gkd kd_temperature=2", "gkd loss_normalization=sequence",
    }  # fmt: skip


def test_where_one_key_of_the_method_tells_settings_apart_it_is_the_label(tmp_path):
    for number in range(2):
        name = f"a-name-of-a-model-as-long-as-a-label-can-be-{number}"
        make_run(tmp_path / str(number), model__student__path=name, method__beta=number)
    assert [setting.label for setting in compare([tmp_path]).settings] == ["gkd beta=0", "gkd beta=1"]


def test_before_training_is_one_row_though_some_methods_measure_more(tmp_path):
    make_run(tmp_path / "a", method__beta=0, result={"before": {"success": 0.5}})
    make_run(tmp_path / "b", "sft", result={"before": {"success": 0.5, "loss": 2.0}})
    rows = table(compare([tmp_path]), "Metrics")
    assert [name for name in rows if name.startswith("before")] == ["before training"]


def test_labels_that_would_be_long_are_numbers_and_the_table_of_settings_has_the_keys(tmp_path):
    for number in range(2):
        make_run(tmp_path / str(number), model__student__path=f"model-with-a-name-of-forty-characters-{number}")
    settings = table(compare([tmp_path]), "Settings")
    assert list(settings) == ["gkd #1", "gkd #2"]
    assert settings["gkd #2"][1] == "model.student.path=model-with-a-name-of-forty-characters-1"


def test_group_by_leaves_other_differences_out(tmp_path):
    make_run(tmp_path / "a", seed=0, method__beta=1, data__path="/one/machine/rows.jsonl")
    make_run(tmp_path / "b", seed=1, method__beta=1, data__path="/another/rows.jsonl")
    assert len(compare([tmp_path]).settings) == 2
    (setting,) = compare([tmp_path], group_by=["method.beta"]).settings
    assert setting.seeds == [0, 1]


def test_sft_is_the_baseline_unless_another_is_named(tmp_path):
    make_run(tmp_path / "a", method__beta=0)
    make_run(tmp_path / "b", method__beta=1)
    assert compare([tmp_path]).baseline.label == "gkd beta=0"
    make_run(tmp_path / "c", "sft")
    assert compare([tmp_path]).baseline.label == "sft"
    comparison = compare([tmp_path], baseline="gkd beta=1")
    assert comparison.differences.keys() == {"gkd beta=0", "sft"}


def test_an_evaluation_alone_is_compared_by_what_it_measured(tmp_path):
    make_run(tmp_path / "gkd")
    run = make_run(tmp_path / "teacher", mode="eval", model__student__path="some/teacher")
    (run / "result.json").write_text(json.dumps({"evaluation": {"success": 0.875}, "seconds": 3.0}))
    rows = table(compare([tmp_path]), "Metrics")
    assert rows["eval path=teacher"] == ["1", "0.875"]
    assert rows["before training"] == ["1", "0.250"]


# Where runs are found, and what is refused


def test_a_multirun_folder_gives_its_runs_in_the_order_of_their_numbers(tmp_path):
    for number in range(11):
        make_run(tmp_path / "sweep" / str(number), method__beta=number)
        (tmp_path / "sweep" / str(number) / "checkpoint-5").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").write_text("hydra: {}")
    comparison = compare([tmp_path / "sweep", tmp_path / "sweep" / "3"])
    assert [setting.label for setting in comparison.settings] == [f"gkd beta={number}" for number in range(11)]


def test_an_unfinished_run_is_named_and_left_out(tmp_path):
    make_run(tmp_path / "done")
    (make_run(tmp_path / "half", seed=1) / "result.json").write_text('{"before": {"success": 0.5}}')
    comparison = compare([tmp_path])
    assert comparison.settings[0].seeds == [0]
    (note,) = [note for note in comparison.notes if note.startswith("left out")]
    assert note.startswith(f"left out: {tmp_path / 'half'} is not finished (it stands at step 5; its command")


def test_a_failed_run_is_left_out_with_what_it_ended_with(tmp_path):
    make_run(tmp_path / "done")
    run = make_run(tmp_path / "failed", seed=1)
    (run / "result.json").write_text('{"before": {"success": 0.5}}')
    start_logging(run)
    logging.getLogger("opd").info("a banner\nof lines")
    note("step 6: the loss is nan; lower train.learning_rate=1 and start again\nand more")
    start_logging()
    (told,) = [line for line in compare([tmp_path]).notes if line.startswith("left out")]
    assert (
        "(it stands at step 5; it ended with: step 6: the loss is nan; lower train.learning_rate=1 and start again;"
        in told
    )


def test_a_stage_that_only_made_data_is_named_and_left_out(tmp_path):
    make_run(tmp_path / "done")
    run = make_run(tmp_path / "stage", mode="responses")
    (run / "result.json").write_text(json.dumps({"seconds": 3.0, "ledger": {}}))
    note = f"left out: {run} is finished and measured nothing (mode=responses)"
    assert note in compare([tmp_path]).notes


def test_scores_that_do_not_average_to_the_stated_metric_are_not_paired_and_that_is_said(tmp_path):
    rows = {row: {"success": 1.0, "loss": 2.0} for row in range(4)}
    make_run(tmp_path / "sft", "sft", rows=rows)
    make_run(tmp_path / "dpo", "dpo", rows=rows, after={"success": 1.0, "loss": 0.6})
    comparison = compare([tmp_path])
    assert comparison.differences["dpo"].keys() == {"success"}
    assert "loss not paired: in result.json of dpo it is not the mean of the scores by row" in comparison.notes


def test_a_run_that_repeats_another_does_not_count_as_a_seed(tmp_path):
    make_run(tmp_path / "a"), make_run(tmp_path / "b")
    comparison = compare([tmp_path])
    assert len(comparison.settings[0].runs) == 1
    assert f"left out: {tmp_path / 'b'} repeats {tmp_path / 'a'} (same setting, same seed)" in comparison.notes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": successes([1.0] * 7)}, "other evaluation rows at seed 0 (7 and 8 of success)"),
        ({"data__eval_prompts": 16}, "other evaluation data: data.eval_prompts is 16 and 8"),
        ({"data__name": "file", "data__path": "a/b.jsonl"}, "other evaluation data: data.name is file and walk"),
        (
            {"rollout__max_completion_tokens": 9},
            "other evaluation data: evaluation.max_completion_tokens is 9 and null",
        ),
        ({"seed": 4}, "no seed in common"),
    ],
)
def test_what_was_evaluated_otherwise_is_not_paired_and_the_reason_is_said(tmp_path, change, reason):
    make_run(tmp_path / "sft", "sft")
    make_run(tmp_path / "gkd", **change)
    comparison = compare([tmp_path])
    assert not comparison.differences
    assert f"not paired: gkd and sft: {reason}" in comparison.notes
    assert len(comparison.settings) == 2


def test_a_run_without_scores_by_row_is_shown_and_not_paired(tmp_path):
    make_run(tmp_path / "sft", "sft")
    (make_run(tmp_path / "gkd") / "scores-after.jsonl").unlink()
    comparison = compare([tmp_path])
    assert f"not paired: gkd and sft: no readable scores-after.jsonl in {tmp_path / 'gkd'}" in comparison.notes
    assert write_comparison(comparison, tmp_path / "out").is_file()


def test_divergences_to_different_teachers_are_not_paired(tmp_path):
    rows = {row: {"success": 1.0, "forward_kl": 0.5, "forward_kl_tokens": 3} for row in range(4)}
    make_run(tmp_path / "sft", "sft", rows=rows, model__teacher__path="one")
    make_run(tmp_path / "gkd", rows=rows, model__teacher__path="two")
    comparison = compare([tmp_path])
    assert comparison.differences["gkd"].keys() == {"success"}
    assert any(note.startswith("not the same teacher") for note in comparison.notes)


def refusal(monkeypatch, capsys, *words: str) -> str:
    """The one line that the command leaves on stderr, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["opd.compare", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line


def test_bad_words_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    run = str(make_run(tmp_path / "runs" / "a", method__beta=0.5))
    make_run(tmp_path / "runs" / "b", method__beta=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    runs = str(tmp_path / "runs")
    for words, wanted in [
        ([str(tmp_path / "absent")], "no such folder; pass run folders"),
        ([str(tmp_path / "file")], "is a file"),
        ([str(tmp_path / "empty")], "no run in it"),
        ([runs, "--baseline", "gkd beta=5"], "--baseline gkd beta=5: no such setting; did you mean gkd beta="),
        ([runs, "--metrics", "sucess"], "--metrics sucess: no run has it; did you mean success?"),
        ([runs, "--group-by", "method.bta"], "--group-by method.bta: no run has this key"),
        ([runs, "--group-by", "train.learning_rate"], "differ in method.beta; add method.beta"),
        ([run, "--out", str(tmp_path / "file")], "cannot be made (File exists); choose another folder"),
    ]:
        assert wanted in refusal(monkeypatch, capsys, *words)


def test_runs_without_a_metric_in_common_and_runs_that_are_all_unfinished_are_refused(tmp_path):
    make_run(tmp_path / "a" / "x", after={"success": 1.0})
    make_run(tmp_path / "a" / "y", "sft", after={"exact_match": 1.0})
    with pytest.raises(ConfigError, match="no metric is common to these runs"):
        compare([tmp_path / "a"])
    (make_run(tmp_path / "b") / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not finished"):
        compare([tmp_path / "b"])


# What is written


def test_the_command_prints_the_tables_and_writes_page_markdown_and_plots(tmp_path, monkeypatch, capsys):
    for seed in range(2):
        make_run(tmp_path / f"sft{seed}", "sft", seed, rows=successes([0.5, 0.25, 1.0]))
        make_run(tmp_path / f"gkd{seed}", seed=seed, rows=successes([1.0, 0.5, 1.0]))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["opd.compare", str(tmp_path), "--out", str(out)])
    main()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert printed.rstrip().endswith(str(out / "comparison.html"))
    assert {file.name for file in out.iterdir()} == {
        "comparison.html",
        "comparison.md",
        "headline.png",
        "curves.png",
        "cost.png",
    }
    page, markdown = ((out / f"comparison.{kind}").read_text() for kind in ("html", "md"))
    for text in (printed, page, markdown):
        for part in ("gkd", "sft", "+0.250", "2 of 2", "better", "not cover the seeds"):
            assert part in text
    for name in ("headline", "curves", "cost"):
        assert f"({name}.png)" in markdown
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| gkd | 2 | 0.833 ± 0.000 |" in markdown


def test_the_page_needs_no_other_file_and_runs_no_script(tmp_path):
    evil = "<script>alert(1)"
    make_run(tmp_path / "a", method__beta=evil, model__student__path=evil)
    make_run(tmp_path / "b", method__beta=0.5)
    page = write_comparison(compare([tmp_path]), tmp_path / "out").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == 3
    for word in ("<script", "<link", "http://", "https://", "@import"):
        assert word not in page
    assert "&lt;script&gt;" in page


def test_comparing_needs_no_torch():
    code = "import sys, opd.compare; sys.exit(bool({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Scores by row, as a run writes them


def test_rows_of_several_ranks_are_merged_by_row_and_tokens_weigh():
    first = {"success": [0, 1.0, 1.0, 2, 0.0, 1.0], "loss": [0, 6.0, 3.0]}
    second = {"success": [1, 1.0, 1.0], "loss": [1, 2.0, 1.0], "recovery": [0, 1.0, 1.0]}
    assert row_scores([first, second]) == [
        {"row": 0, "loss": 2.0, "loss_tokens": 3, "recovery": 1.0, "success": 1.0},
        {"row": 1, "loss": 2.0, "loss_tokens": 1, "success": 1.0},
        {"row": 2, "success": 0.0},
    ]


MINI = [
    "model.student.recipe.steps=3",
    "model.student.recipe.batch_size=8",
    "model.teacher.recipe.steps=4",
    "model.teacher.recipe.batch_size=8",
    "model.teacher.recipe.hidden_size=32",
    "data.limit=32",
    "data.eval_prompts=15",
    "train.max_steps=2",
    "train.batch_size=8",
    "train.warmup_steps=1",
]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A real run of the embedded task."""
    folder = tmp_path_factory.mktemp("mini")
    answer = call(f"run.dir={folder / 'one'}", f"artifacts.dir={folder / 'artifacts'}", *MINI)
    assert answer.code == 0, answer.stderr
    return folder


def scores_average_to_the_result(run: Path, phase: str) -> None:
    metrics = read_run(run).result[phase]
    lines = [json.loads(line) for line in (run / f"scores-{phase}.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(15))
    columns = read_columns(run / f"scores-{phase}.jsonl")
    assert columns.keys() == metrics.keys() - {"perplexity"}
    for name, column in columns.items():
        total, weight = (sum(x) for x in zip(*((v * w, w) for v, w in column.values()), strict=True))
        if f"{name}_tokens" in lines[0]:
            assert weight > 15 and total / weight == pytest.approx(metrics[name], rel=1e-9), name
        else:
            assert weight == 15 and total / weight == metrics[name], name


@pytest.mark.parametrize("phase", ["before", "after"])
def test_the_scores_of_the_rows_average_to_the_metrics_of_the_result(mini, phase):
    scores_average_to_the_result(mini / "one", phase)


@pytest.mark.slow
def test_two_ranks_write_the_scores_of_one(mini):
    answer = shell(f"run.dir={mini / 'two'}", f"artifacts.dir={mini / 'artifacts'}", "hardware=cpu_2rank", *MINI)
    assert answer.code == 0, answer.stderr
    scores_average_to_the_result(mini / "two", "after")
    one, two = (read_columns(mini / ranks / "scores-before.jsonl") for ranks in ("one", "two"))
    assert one.keys() == two.keys()
    for name, column in one.items():
        assert column.keys() == two[name].keys()
        for row, entry in column.items():
            assert two[name][row] == pytest.approx(entry, rel=1e-4, abs=1e-6)
    assert [setting.label for setting in compare([mini / "one", mini / "two"]).settings] == ["gkd"]
