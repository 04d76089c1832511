"""What a person sees: log lines on the console and in training.log, and a progress bar."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from opd import distributed
from opd.config import Config, Hardware

log = logging.getLogger("opd")


def start_logging(folder: Path | None = None) -> None:
    """Console lines on rank 0, and everything into <folder>/training.log once there is a folder."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in [h for h in log.handlers if isinstance(h, logging.FileHandler) or folder is None]:
        handler.close()
        log.removeHandler(handler)
    if folder is None and distributed.rank() == 0:
        console = _TqdmHandler()
        console.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(console)
    if folder is not None:
        name = "training.log" if distributed.rank() == 0 else f"training-rank{distributed.rank()}.log"
        file = logging.FileHandler(folder / name, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


def note(line: str) -> None:
    """Into the run's log alone, for run_record.last_note: the console is told by whoever started this process."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, line, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def banner(config: Config, facts: dict[str, str]) -> str:
    """Student, teacher, method, data, machine, tokens a step and where the run writes, a line each."""
    method = {name: value for name, value in config.method.model_dump().items() if name != "name" and value is not None}
    hardware, sequences = config.hardware, config.train.batch_size * config.rollout.group_size
    tokens = sequences * config.rollout.max_completion_tokens
    lines = {
        "student": facts["student"],
        "teacher": facts["teacher"],
        "method": f"{config.method.name} ({', '.join(f'{name} {value}' for name, value in method.items())})",
        "data": facts["data"],
        "hardware": ", ".join([f"{hardware.name}: {hardware.world_size} x {hardware.device}", *_layout(hardware)]),
        "a step": f"{config.train.batch_size} prompts x {config.rollout.group_size} = {sequences} sequences, "
        f"at most {tokens:,} completion tokens; {facts['steps']} steps",
        "writes to": config.run.dir,
    }
    if config.mode != "train":
        del lines["a step"]
    return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())


def _layout(hardware: Hardware) -> list[str]:
    """Precision, and what does not lie whole on every rank."""
    student = [] if hardware.sharding == "ddp" else [f"student by {hardware.sharding}"]
    teacher = [] if hardware.teacher_placement == "local" else [f"teacher by {hardware.teacher_placement}"]
    return [hardware.precision, *student, *teacher]


class _TqdmHandler(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A bar of optimizer steps with loss, KL and tokens a second; silent on other ranks."""

    def __init__(self, title: str, steps: int, done: int = 0) -> None:
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=title,
            disable=distributed.rank() > 0,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Move to this step."""
        shown = {
            "loss": metrics.get("train/loss"),
            "kl": metrics.get("train/reverse_kl"),
            "tok/s": metrics.get("tokens_per_second"),
        }
        self._bar.set_postfix(
            {k: f"{v:,.0f}" if k == "tok/s" else f"{v:.3f}" for k, v in shown.items() if v is not None},
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
