"""hydra/sweeper=grid: every combination of the values in the command, as one batch."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, but that nothing is written and no job begins before the launcher has seen all of them."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Hand all jobs to the launcher; returns what it returns."""
        assert self.hydra_context is not None and self.launcher is not None  # Hydra has called setup
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (jobs,) = self.split_arguments(overrides, None)
        return self.launcher.launch(jobs, initial_job_idx=0)
