"""The front door: compose (Hydra) -> validate -> launch. No torch here: --help, --cfg and bad input answer at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from opd import interruption
from opd.composition import CONF, explain, plain
from opd.errors import ConfigError, OpdError
from opd.together import is_alone, is_follower

# Beside the package in a checkout; a wheel has what lies in it among the other packages.
_LAUNCHERS = Path(__file__).resolve().parents[1] / "launchers"

USAGE = """opd distils language models: any method, any hardware, one command.

  python -m opd                                  the embedded task on this CPU: trains, reports
  python -m opd method=reverse_kl                another method
  python -m opd data=file data.path=rows.jsonl model/student=path model.student.path=FOLDER_OR_HUB_ID \\
                model/teacher=path model.teacher.path=FOLDER_OR_HUB_ID
  python -m opd -m method.beta=0,0.5,1           a sweep
  python -m opd hydra/launcher=slurm …           as a Slurm job; after -m every job of the sweep
  python -m opd --cfg job                        everything a run would use; nothing runs
  python -m opd --hydra-help                     Hydra's own flags
"""


def main() -> None:
    """`opd` and `python -m opd`. Exit 0; 1 where the run failed; 2 where config or data cannot run; 130 on Ctrl-C.

    3 where the checks found an error; 85 in a Slurm job that was interrupted, and what is worth it saved.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions over instead of printing them
    if _LAUNCHERS.is_dir() and str(_LAUNCHERS) not in sys.path:
        sys.path.append(str(_LAUNCHERS))  # a checkout that is not installed: Hydra looks for hydra_plugins on the path
    with interruption.handled():
        if _comes_back():
            with interruption.requeued():
                code = _command() if is_alone() else _command_together()
        else:
            code = _command() if is_alone() else _command_together()
    if code:
        sys.exit(code)


def _comes_back() -> bool:
    """Whether an interrupted job is to be requeued for this command: not for a follower, nor to submit once more."""
    return not is_follower() and "hydra/launcher=slurm" not in sys.argv


def _command_together() -> int:
    """The command of several processes, one of which runs it."""
    from opd.launch import together

    is_torchrun = "RANK" in os.environ  # which its process forgets then

    def command() -> int:
        if is_torchrun and {"-m", "--multirun"} & set(sys.argv[1:]):
            return _say(ConfigError("-m: torchrun and accelerate launch start one run; leave them out for a sweep"))
        return _command()

    try:
        return together(command)
    except OpdError as error:
        return _say(error)


def _command() -> int:
    try:
        _compose_and_run()
    except OpdError as error:
        return _say(error)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 130
    return 0


def _say(error: OpdError) -> int:
    for line in str(error).splitlines():
        print(f"opd: {line}", file=sys.stderr)
    return error.exit_code


def _compose_and_run() -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    entry = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_task)
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(_help([word for word in sys.argv[1:] if not word.startswith("-")]))
        else:
            entry()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None


def _help(overrides: list[str]) -> str:
    """Usage, groups, and the config that these overrides make. Hydra's own help takes twice as long."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=overrides)
    groups: dict[str, list[str]] = {}
    for path in sorted(CONF.glob("*/**/*.yaml")):
        groups.setdefault(str(path.parent.relative_to(CONF)), []).append(path.stem)
    listed = "\n".join(f"  {group:14}  {', '.join(options)}" for group, options in groups.items())
    return f"{USAGE}\nGroups (group=option)\n{listed}\n\nEvery key (key=value)\n{OmegaConf.to_yaml(config)}"


def _task(composed: Any) -> None:
    from opd.stages import run

    try:
        raw = plain(composed)
        try:
            run(raw)
        except KeyboardInterrupt as interrupt:
            told = f"interrupted; the same command with run.dir={raw['run']['dir']} continues"
            raise KeyboardInterrupt(str(interrupt) or told) from None
    except OpdError as error:  # Hydra would print a line of its own above ours
        sys.exit(_say(error))


if __name__ == "__main__":
    main()
