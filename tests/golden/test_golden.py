"""The methods reproduce numbers computed with the reference implementations that MANIFEST.json names.

OPD_GOLDEN_DIR names another folder of the same form; by default the selection beside this file is used.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from evaluate import covered, evaluate

FOLDER = Path(os.environ.get("OPD_GOLDEN_DIR") or Path(__file__).parent / "data")
CASES = json.loads((FOLDER / "MANIFEST.json").read_text())
CASES = [case for case in CASES if case["method"] != "opsd_builder"]  # files, not arrays: test_builder.py


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_a_method_reproduces_the_reference(case, dtype):
    if not covered(case):
        pytest.skip(f"not covered: {case['method']} is not built")
    arrays = dict(np.load(FOLDER / case["file"], allow_pickle=False))
    inputs = {
        name: array.astype(dtype) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
        if name.startswith("in_")
    }
    outputs = evaluate(case, inputs)
    assert set(outputs) == {name for name in arrays if name.startswith("out_")}
    rtol, atol = ("rtol", "atol") if dtype == "float64" else ("fp32_rtol", "fp32_atol")
    for name, value in outputs.items():
        assert value.shape == arrays[name].shape, name
        if arrays[name].dtype.kind == "U":
            assert value == arrays[name]
            continue
        np.testing.assert_allclose(value, arrays[name], rtol=case[rtol], atol=case[atol], err_msg=name)
