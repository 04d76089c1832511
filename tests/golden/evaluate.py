"""Reproduces a golden case with the code that trains: the same methods, layouts and fused sums.

A case is an entry of MANIFEST.json; its arrays are named in_* and out_*.
"""

from __future__ import annotations

from typing import Any

import alignment_cases
import likelihood_and_divergence_cases
import minillm_cases
import numpy as np
import opsd_cases
import preference_cases
import torch

Arrays = dict[str, np.ndarray]

_EVALUATORS = {
    **likelihood_and_divergence_cases.EVALUATORS,
    **preference_cases.EVALUATORS,
    **alignment_cases.EVALUATORS,
    **minillm_cases.EVALUATORS,
    **opsd_cases.EVALUATORS,
}


def covered(case: dict[str, Any]) -> bool:
    """Whether the method of this case is built; a case that is not covered has not passed."""
    return case["method"] in _EVALUATORS


def evaluate(case: dict[str, Any], inputs: Arrays) -> Arrays:
    """The outputs of the case, in the dtype of its inputs."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items() if name.startswith("in_")}
    outputs: dict[str, Any] = _EVALUATORS[case["method"]](case["params"], tensors)
    arrays = {name: output.detach() if torch.is_tensor(output) else output for name, output in outputs.items()}
    return {name: np.asarray(arrays[name]) for name in case["outputs"]}
