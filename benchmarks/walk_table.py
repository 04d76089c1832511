"""Every method on the number walk, three seeds each: the tables of docs/results.md, from nothing.

python benchmarks/walk_table.py                       all of it, one process a core
python benchmarks/walk_table.py --seeds 0 --only gold one seed, only tables and settings named "gold"

Every setting is `python -m opd -m` with the words that stand below, over the seeds; its runs are
OUT/<table>/<setting>/seed<N>. A finished run of the same words is not made again, so an interrupted table continues;
remove OUT after changing code or configs. Beside the runs: table.md, and for each table what `python -m opd.compare`
writes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from opd.artifacts.comparison import compare, write_comparison
from opd.artifacts.comparison_statistics import spread
from opd.artifacts.run_record import RunRecord, read_run
from opd.errors import OpdError

COLUMNS = {  # a metric of result.json, and what heads its column
    "success_greedy": "greedy",
    "optimal_greedy": "optimal",
    "success_sampled": "T = 1",
    "recovery": "recovery",
    "hinted": "with hint",
    "bold_sampled": "bold",
    "accuracy": "pairs right",
    "length_mean": "length",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
}
DIVERGENCES = ("forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Table:
    """Settings that start from the same student: what each is called, and its words."""

    title: str
    before: str
    columns: tuple[str, ...]
    settings: dict[str, str]
    baseline: str | None = None


PLAIN = ("success_greedy", "optimal_greedy", "success_sampled", "recovery")
BOLD = "data=walk_bold model/student=walk_strong"
ALONE = "model/teacher=none train.max_steps=150"
WEAK = "model.student.recipe.steps=150"
TABLES = {
    "plain": Table(
        "One tokenizer, no preference",
        "base student",
        (*PLAIN, *DIVERGENCES),
        {
            "sft": "experiment=walk_sft",
            "sft, 6,000 prompts": "experiment=walk_sft data.limit=6000",
            "gkd λ 0, β 0": "experiment=walk_gkd method.lmbda=0 method.beta=0",
            "gkd λ 0, β 1": "experiment=walk_gkd method.lmbda=0 method.beta=1",
            "gkd λ 0, β 0, seq_kd": "experiment=walk_gkd method.lmbda=0 method.beta=0 method.seq_kd=true",
            "gkd λ 1, β 0": "experiment=walk_gkd method.beta=0",
            "gkd λ 1, β .5": "experiment=walk_gkd",
            "gkd λ 1, β .5, 6,000 prompts": "experiment=walk_gkd data.limit=6000",
            "gkd λ 1, β 1": "experiment=walk_gkd method.beta=1",
            "minillm": "experiment=walk_minillm",
            "minillm, mode paper": "experiment=walk_minillm method.mode=paper",
            "reverse_kl, discount 0": "experiment=walk_reverse_kl",
            "reverse_kl, discount .95": "experiment=walk_reverse_kl method.kl_discount=0.95 train.learning_rate=5e-4",
        },
        "sft",
    ),
    "weak": Table(
        "From a base that almost never succeeds at temperature 1 (150 steps instead of 300)",
        "weak base",
        (*PLAIN, *DIVERGENCES),
        {
            "sft, weak base": f"experiment=walk_sft {WEAK}",
            "gkd λ 1, β 0, weak base": f"experiment=walk_gkd method.beta=0 {WEAK}",
            "gkd λ 1, β 1, weak base": f"experiment=walk_gkd method.beta=1 {WEAK}",
            "reverse_kl, weak base": f"experiment=walk_reverse_kl {WEAK}",
        },
        "sft",
    ),
    "tokenizers": Table(
        "Across tokenizers (student walk_430)",
        "base student, 430 entries",
        PLAIN,
        {
            "sft, 430": f"experiment=walk_sft model/student=walk_430 {ALONE}",
            "gold, hybrid": "experiment=walk_gold",
            "gold, merge observed": "experiment=walk_gold method.merge=observed",
            "gold, sorted ULD alone": "experiment=walk_gold method.hybrid=false",
        },
        "sft",
    ),
    "hint": Table(
        "The model as its own teacher (student walk_hint)",
        "base student",
        (*PLAIN, "hinted"),
        {
            "sft on the hints": f"experiment=walk_sft data=walk_hint model/student=walk_hint {ALONE}",
            "opsd, β 0": "experiment=walk_opsd method.beta=0",
            "opsd, β .5": "experiment=walk_opsd",
            "opsd, β 1": "experiment=walk_opsd method.beta=1",
        },
        "sft",
    ),
    "bold": Table(
        "Big moves first (student walk_strong)",
        "base student",
        ("bold_sampled", *PLAIN),
        {
            "sft on the chosen": f"experiment=walk_sft {BOLD} train.max_steps=150",
            "dpo": "experiment=walk_dpo",
            "dpo without its sft term": "experiment=walk_dpo method.sft_weight=0",
            "dckd": "experiment=walk_dckd",
            "adpa": "experiment=walk_adpa",
            "gkd λ 1, β 1, teacher without DPO": f"experiment=walk_gkd {BOLD} method.beta=1 train.max_steps=150",
        },
        "sft",
    ),
    "short": Table(
        "Shorter is better, without cross-entropy (student walk_strong)",
        "base student",
        ("accuracy", "success_greedy", "success_sampled", "recovery", "length_mean"),
        {"dpo, shorter preferred": "experiment=walk_dpo_short"},
    ),
}


@dataclass(frozen=True)
class Job:
    """A setting, and the seeds that are wanted of it."""

    setting: str
    words: str
    folder: Path
    seeds: list[int]

    @property
    def records(self) -> list[RunRecord]:
        """The runs of these words that lie there, at their end."""
        found = [read_run(self.run(seed)) for seed in self.seeds if self.run(seed).is_dir()]
        command = f"{self.words} run.seed="
        return [record for record in found if record.finished and command in str(record.provenance.get("command"))]

    @property
    def missing(self) -> list[int]:
        """Seeds without such a run."""
        there = {record.folder for record in self.records}
        return [seed for seed in self.seeds if self.run(seed) not in there]

    def run(self, seed: int) -> Path:
        """Folder of one run."""
        return self.folder / f"seed{seed}"


def main() -> None:
    words = _words()
    os.environ["OMP_NUM_THREADS"] = "1"  # two processes of two threads on two cores are slower than of one each
    started = time.perf_counter()
    tables = {name: _jobs(words.out / name, table, words.seeds) for name, table in TABLES.items()}
    wanted = [job for name, jobs in tables.items() for job in jobs if words.only in f"{name} {job.setting}"]
    if not wanted:
        sys.exit(f"--only {words.only}: no table or setting has this in its name")
    with ThreadPoolExecutor(words.processes) as pool:
        list(pool.map(_make, wanted))
    text = "\n".join(_markdown(TABLES[name], jobs) for name, jobs in tables.items())
    (words.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    for name, table in TABLES.items():
        _compare(words.out / name, table)
    print(f"{words.out / 'table.md'} after {(time.perf_counter() - started) / 60:.1f} minutes")
    if failed := [job.setting for job in wanted if job.missing]:
        sys.exit(f"failed: {', '.join(failed)}")


def _words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The tables of docs/results.md, from nothing.")
    parser.add_argument("--out", type=Path, default=Path("outputs/walk-table"), metavar="OUT", help="where it all lies")
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2], metavar="A,B", help="0,1,2 if not given")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tables and settings with this in their names")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="settings at once; one a core")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _jobs(folder: Path, table: Table, seeds: list[int]) -> list[Job]:
    def name(setting: str) -> str:
        plain = setting.replace("λ", "lmbda").replace("β", "beta")
        return re.sub(r"[^a-z0-9.]+", "-", plain.lower()).strip("-")

    return [Job(setting, words, folder / name(setting), seeds) for setting, words in table.settings.items()]


def _make(job: Job) -> None:
    """Makes the runs that are missing, and says how long that took."""
    missing, started = job.missing, time.perf_counter()
    if not missing:
        print(f"{'there':>8}  {job.setting}", flush=True)
        return
    seeds = ",".join(map(str, missing))
    sweep = [f"run.seed={seeds}", f"hydra.sweep.dir={job.folder}", "hydra.sweep.subdir=seed${run.seed}"]
    command = [sys.executable, "-m", "opd", "-m", *job.words.split(), *sweep, "train.eval_every_steps=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    problem = "" if done.returncode == 0 else f": {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
    print(f"{time.perf_counter() - started:6.1f} s  {job.setting}, seeds {seeds}{problem}", flush=True)


def _markdown(table: Table, jobs: list[Job]) -> str:
    """The table with a row for every setting of which all seeds are there, mean ± sample standard deviation."""
    found = {job.setting: job.records for job in jobs if not job.missing}
    if not found:
        return ""
    rows = [(table.before, [record.result["before"] for record in next(iter(found.values()))], [])]
    for setting, records in found.items():
        seconds = [record.result["train_seconds"] for record in records]
        rows.append((setting, [record.result["after"] for record in records], seconds))
    heads = [table.title, *(COLUMNS[metric] for metric in table.columns), "seconds"]
    lines = [heads, ["---"] * len(heads)]
    for label, results, seconds in rows:
        cells = [_cell([result[metric] for result in results if metric in result]) for metric in table.columns]
        lines.append([label, *cells, f"{spread(seconds).mean:.1f}" if seconds else "–"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    found = spread(values)
    return f"{found.mean:.3f}" + ("" if found.sd is None else f" ± {found.sd:.3f}")


def _compare(folder: Path, table: Table) -> None:
    try:
        print(write_comparison(compare([folder], baseline=table.baseline), folder.parent / f"compare-{folder.name}"))
    except OpdError as error:
        print(f"{folder.name} is not compared: {error}")


if __name__ == "__main__":
    main()
