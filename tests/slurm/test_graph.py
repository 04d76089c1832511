"""adpa's graph of stages as one job on two machines, interrupted in a stage that trains."""

from __future__ import annotations

from e2e.adpa_graph import STAGES, assert_close, graph, made, words
from launch.commands import begin, faulty, finish

from slurm.cluster import until

# Rank 0 waits in a step of the first stage, and only when the job runs for the first time.
HOLD_IN_STAGE = (
    "import os, time; from opd import interruption\n"
    "            while os.environ.get('SLURM_RESTART_COUNT', '0') == '0' and not interruption.requested():"
    " time.sleep(0.05)"
)


def test_an_interrupted_graph_on_two_machines_continues_in_its_stage_and_ends_where_one_process_does(slurm, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    graph(one)
    env = {**slurm.env, **faulty(tmp_path, rank=0, fault=HOLD_IN_STAGE, step=3)}
    job_words = ["hydra/launcher=slurm", "hydra.launcher.wait=false", "hydra.launcher.timeout_min=20"]
    machines = ["hardware.nodes=2", "train.micro_batch_size=4"]
    code, said = finish(begin("opd", *words(two, *machines, *job_words), env=env, cwd=tmp_path))
    assert code == 0, said
    job = said.partition("job 0 (")[2].partition(")")[0]
    log = two / "run" / ".slurm" / job / f"{job}_0_log.out"
    partial = until(lambda: list((two / "store").glob("*.partial/metrics.jsonl")), seconds=200)[0].parent
    until(lambda: '"step": 3,' in (partial / "metrics.jsonl").read_text(), seconds=60)
    slurm.call("scancel", "--signal=USR2", job)
    assert slurm.ended(job) == "COMPLETED", log.read_text()
    assert slurm.show(job)["Restarts"] == "1"
    assert f"continues the interrupted run in {partial} from step" in log.read_text()
    assert made(two) == STAGES
    assert_close(two / "run", one / "run")
