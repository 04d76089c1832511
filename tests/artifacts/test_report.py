"""The report of a run folder: complete when all is there, honest when something is not, safe always."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from opd.artifacts.plots import smooth
from opd.artifacts.report import write_report
from opd.artifacts.run_record import series
from opd.artifacts.table import before_after_table, direction_of, format_number, format_table
from opd.errors import ConfigError

SECTIONS = [
    "Results",
    "Curves",
    "Samples before and after",
    "Rollouts over time",
    "Reproduce",
    "Configuration",
    "Provenance",
]
CONFIG = """
run: {name: tiny run}
model: {student: {path: student/tiny}, teacher: {path: teacher/big}}
method: {name: gkd}
data: {name: embedded}
hardware: {name: cpu}
"""
PROVENANCE = {"commit": "abc123", "dirty": True, "versions": {"torch": "2.13.0"}, "command": ["opd", "a=b c"]}
RESULT = {
    "before": {"success_greedy": 0.1, "forward_kl": 2.0, "length_mean": 9.0},
    "after": {"success_greedy": 0.9, "forward_kl": 0.5, "length_mean": 7.0},
    "seconds": 75.0,
    "train_seconds": 50.0,
    "tokens": 100_000,
    "student_parameters": 5_000_000,
}


def sample(phase: str, step: int, prompt: str = "2+2?", completion: str = "4", **more: object) -> dict:
    columns = {"step": step, "phase": phase, "prompt": prompt, "completion": completion, "origin": "student"}
    return {**columns, "finished": True, **more}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "provenance.json").write_text(json.dumps(PROVENANCE))
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    metrics = [{"step": step, "train/loss": 1 / step, "seconds_per_step": 0.5} for step in range(1, 6)]
    write_lines(tmp_path / "metrics.jsonl", metrics)
    samples = [
        sample("before", 0, completion="5", success=0),
        sample("train", 3),
        sample("after", 5, success=1),
    ]
    write_lines(tmp_path / "samples.jsonl", samples)
    return tmp_path


def render(run_dir: Path) -> tuple[str, str]:
    """The HTML and the Markdown."""
    html = write_report(run_dir)
    return html.read_text(encoding="utf-8"), (run_dir / "report.md").read_text(encoding="utf-8")


def test_both_reports_name_every_section_and_the_run(run_dir):
    html, markdown = render(run_dir)
    for section in SECTIONS:
        assert f"<h2>{section}</h2>" in html
        assert f"\n## {section}\n" in markdown
    for text in (html, markdown):
        for part in (
            "tiny run",
            "gkd",
            "student/tiny",
            "teacher/big",
            "embedded",
            "cpu",
            "finished at step 5",
        ):
            assert part in text
        for part in (
            "1 min 15 s",
            "100 k",
            "5 M",
            "2,000",
        ):  # wall time, tokens, parameters, tokens per second
            assert part in text


def test_the_page_needs_no_other_file_and_no_script(run_dir):
    html, _ = render(run_dir)
    assert 'src="data:image/svg+xml;base64,' in html
    assert "<script" not in html and "<link" not in html
    assert "http://" not in html and "https://" not in html


def test_markdown_links_plots_that_exist(run_dir):
    _, markdown = render(run_dir)
    assert "(plots/loss.png)" in markdown
    assert (run_dir / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_only_panels_with_data_are_drawn(run_dir):
    render(run_dir)
    assert [plot.name for plot in (run_dir / "plots").iterdir()] == ["loss.png"]


def test_a_script_written_by_a_model_is_escaped_wherever_it_appears(run_dir):
    evil = "<script>alert(1)</script>"
    texts = {"prompt": evil, "completion": evil, "reference": evil, "origin": evil, evil: 1}
    write_lines(run_dir / "samples.jsonl", [sample(phase, 1) | texts for phase in ("before", "train", "after")])
    (run_dir / "config.yaml").write_text(f"run: {{name: '{evil}'}}")
    html, _ = render(run_dir)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_completion_cannot_close_its_markdown_block(run_dir):
    write_lines(run_dir / "samples.jsonl", [sample("before", 0, completion="```\n# title\n````")])
    _, markdown = render(run_dir)
    assert "`````text\n```\n# title\n````\n`````" in markdown


def test_unicode_survives_and_half_a_surrogate_pair_does_not_crash(run_dir):
    good = "Что? 日本語 🧮 e\u0301 \u2028 \u202e"
    write_lines(run_dir / "samples.jsonl", [sample("before", 0, completion=good), sample("after", 1, "\ud83d\x00?")])
    html, markdown = render(run_dir)
    assert good in html and good in markdown
    assert "\\ud83d\\x00?" in html


def test_a_run_without_result_says_interrupted_and_at_which_step(run_dir):
    (run_dir / "result.json").unlink()
    for text in render(run_dir):
        assert "interrupted at step 5" in text and "finished at" not in text
        assert "result.json is missing." in text.replace("\\", "")


def test_an_interrupted_run_shows_its_last_evaluation(run_dir):
    (run_dir / "result.json").unlink()
    evaluations = [{"step": step, "eval/success_greedy": value} for step, value in ((0, 0.25), (20, 0.5), (40, 0.75))]
    write_lines(run_dir / "metrics.jsonl", [*evaluations, {"step": 47, "train/loss": 1.0}])
    _, markdown = render(run_dir)
    assert "interrupted at step 47" in markdown
    assert "| metric | better is | before | step 40 | difference | |" in markdown
    assert "| success_greedy | ↑ higher | 0.250 | 0.750 | +0.500 | better |" in markdown


def test_a_missing_metrics_file_is_said_and_not_fatal(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    html, markdown = render(run_dir)
    for text in (html, markdown):
        assert "metrics.jsonl is missing." in text
        assert "Nothing to draw: no step was logged (metrics.jsonl)." in text
    assert not (run_dir / "plots").exists()


def test_an_empty_folder_gets_a_report_that_says_so_in_every_section(tmp_path):
    html, markdown = render(tmp_path)
    for text in (html, markdown):
        for name in ("config.yaml", "provenance.json", "metrics.jsonl", "samples.jsonl", "result.json"):
            assert f"{name} is missing." in text
        assert "interrupted before the first logged step" in text
        for what, file in (
            ("evaluation was recorded", "result.json"),
            ("no step was logged", "metrics.jsonl"),
            ("samples from before or after training were recorded", "samples.jsonl"),
            ("rollouts were recorded during training", "samples.jsonl"),
            ("command was not recorded", "provenance.json"),
            ("configuration was not recorded", "config.yaml"),
            ("provenance was not recorded", "provenance.json"),
        ):
            assert f"{what} ({file})." in text


@pytest.mark.parametrize("junk", ["", "{", "[1, 2]", "null", "3", "a: b: c", '{"before": 3, "after": [1]}', "\xff"])
def test_no_malformed_file_crashes_the_report(tmp_path, junk):
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "samples.jsonl", "result.json"):
        (tmp_path / name).write_text(junk, encoding="latin-1")
    for text in render(tmp_path):
        assert "interrupted" in text


def test_an_evaluation_without_training_counts_as_finished(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "config.yaml").write_text("mode: eval")
    (run_dir / "result.json").write_text(json.dumps({"evaluation": {"exact_match": 0.5}, "seconds": 3.0}))
    html, markdown = render(run_dir)
    assert "**evaluation only, finished**" in markdown and "interrupted at" not in html
    assert "| exact_match | ↑ higher | 0.500 |\n" in markdown
    assert "before" not in markdown.split("## Configuration")[0] and ">before<" not in html


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("lm_eval/loss_of_words/acc_norm", "higher"),
        ("eval/lm_eval/gsm8k/exact_match/strict-match", "higher"),
        ("lm_eval/exact_match_of_paths/bits_per_byte", "lower"),
        ("lm_eval/accuracy_of_clocks/ter", "lower"),
        ("lm_eval/acc/seconds", "neutral"),
    ],
)
def test_of_a_task_the_metric_says_what_is_better_and_not_the_tasks_name(metric, direction):
    assert direction_of(metric) == direction


def test_half_a_last_line_is_skipped_and_counted(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    html, _ = render(run_dir)
    assert "metrics.jsonl: 1 unreadable line skipped." in html
    assert "finished at step 5" in html


def test_nan_and_inf_are_shown_as_such(run_dir):
    result = {
        "before": {"eval_loss": 1.0, "forward_kl": 1.0},
        "after": {"eval_loss": math.nan, "forward_kl": math.inf},
    }
    (run_dir / "result.json").write_text(json.dumps(result))
    values = [math.nan, math.inf, -math.inf, 1.0, "NaN"]
    write_lines(
        run_dir / "metrics.jsonl",
        [{"step": step, "train/loss": value, "train/grad_norm": math.nan} for step, value in enumerate(values, 1)],
    )
    html, markdown = render(run_dir)
    assert "| eval_loss | ↓ lower | 1.000 | nan | nan | undefined |" in markdown
    assert "| forward_kl | ↓ lower | 1.000 | inf | +inf | worse |" in markdown
    assert "train/loss is nan or inf at 4 of 5 logged steps" in html
    assert "train/grad_norm is nan or inf at 5 of 5 logged steps" in html


def test_samples_of_the_same_prompt_stand_side_by_side_in_file_order(run_dir):
    prompts = ["only before", "p1", "p2", "p3", "p4"]
    lines = [sample("before", 0, prompt, f"old {prompt}") for prompt in prompts]
    lines += [sample("after", 9, prompt, f"new {prompt}") for prompt in reversed(prompts[1:])]
    write_lines(run_dir / "samples.jsonl", lines)
    html, _ = render(run_dir)
    places = [html.index(f"{age} p{number}") for number in (1, 2, 3) for age in ("old", "new")]
    assert places == sorted(places)
    assert "old p4" not in html and "old only before" not in html


def test_the_command_is_quoted_for_a_shell_and_uncommitted_changes_are_told(run_dir):
    html, markdown = render(run_dir)
    assert "opd &#39;a=b c&#39;" in html and "opd 'a=b c'" in markdown
    assert "uncommitted changes" in html and "uncommitted changes" in markdown
    assert "versions.torch" in html


def test_the_same_folder_gives_the_same_bytes(run_dir):
    assert render(run_dir) == render(run_dir)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pass the run folder"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("success_greedy", "higher"),
        ("optimal_sampled", "higher"),
        ("recovery", "higher"),
        ("eval/exact_match", "higher"),
        ("token_agreement", "higher"),
        ("gsm8k/exact_match,strict-match", "higher"),
        ("gsm8k/exact_match_stderr,strict-match", "neutral"),
        ("forward_kl", "lower"),
        ("eval/reverse_kl", "lower"),
        ("eval_loss", "lower"),
        ("length_mean", "neutral"),
        ("truncated_fraction", "neutral"),
        ("tackle", "neutral"),
    ],
)
def test_each_metric_has_its_direction_of_improvement(metric, direction):
    assert direction_of(metric) == direction


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("forward_kl", 2.0, 1.0, "better"),
        ("forward_kl", 1.0, 2.0, "worse"),
        ("success_greedy", 0.0, 1.0, "better"),
        ("success_greedy", 1.0, 0.0, "worse"),
        ("success_greedy", 1.0, 1.0, "same"),
        ("success_greedy", 1.0, math.nan, "undefined"),
        ("length_mean", 1.0, 2.0, ""),
        ("forward_kl", None, 2.0, ""),
    ],
)
def test_better_means_better_for_that_metric(metric, before, after, verdict):
    (row,) = before_after_table({metric: before}, {metric: after})
    assert row.verdict == verdict


def test_a_metric_of_one_side_only_keeps_its_row():
    rows = before_after_table({"a": 1.0, "forward_kl": 2.0}, {"b": 3, "task": {"acc": 0.5}, "note": "text"})
    assert [row.metric for row in rows] == ["forward_kl", "a", "b", "task/acc", "note"]
    assert rows[1].cells == ("1.000", "—", "—")
    assert rows[2].cells == ("—", "3.000", "—")


def test_the_terminal_table_is_aligned():
    lines = format_table(before_after_table(RESULT["before"], RESULT["after"])).splitlines()
    assert lines == [
        "metric            before  after  difference",
        "success_greedy ↑   0.100  0.900      +0.800  better",
        "forward_kl ↓       2.000  0.500      -1.500  better",
        "length_mean        9.000  7.000      -2.000",
        "↑ higher is better, ↓ lower is better",
    ]
    assert format_table([]) == "no metrics recorded"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (0.0, "0.000"),
        (0.0004, "0.0004"),
        (12.345, "12.35"),
        (203.14, "203.1"),
        (1.5e7, "1.500e+07"),
    ],
)
def test_numbers_keep_the_digits_that_matter(value, text):
    assert format_number(value) == text


def test_a_step_logged_twice_counts_once_with_its_later_value():
    lines = [{"step": 2, "x": 5}, {"step": 1, "x": 1}, {"step": 2, "x": 7}, {"step": 2, "y": 0}, {"x": 9}]
    assert series(lines, "x") == [(1, 1.0), (2, 7.0)]


def test_smoothing_leaves_a_constant_alone_even_at_the_ends():
    assert smooth([3.0] * 60, 7) == pytest.approx([3.0] * 60)
    assert smooth([1.0, 2.0, 6.0], 3) == pytest.approx([1.5, 3.0, 4.0])


def test_the_table_needs_no_matplotlib():
    code = "import sys, opd.artifacts.table; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
