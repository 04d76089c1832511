"""A training that is asked to end soon: all ranks finish the same step, save it, and leave."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from opd import distributed, interruption

log = logging.getLogger("opd")


class EarlyEnd(TrainerCallback):
    """Saves and ends when a signal has come to any rank, whatever train.save_every_steps says.

    The last of the callbacks: what others do at the end of a step, as evaluating, is done before the checkpoint.
    """

    def __init__(self) -> None:
        self._agreed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interruption.defer(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A signal reaches the ranks at different times; a rank alone would wait for the others in the next step.
        self._agreed = bool(distributed.maximum(torch.tensor(float(interruption.requested()))))
        if self._agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interruption.defer(False)
        if self._agreed:
            log.info("interrupted: checkpoint-%d is saved", state.global_step)
            interruption.leave()
