"""The shapes that the signatures state are those that the functions take and give."""

from __future__ import annotations

import importlib
import sys
import typing

import pytest
import torch

import opd
import opd.objectives

pytest.importorskip("beartype")
jaxtyping = pytest.importorskip("jaxtyping")


@pytest.fixture(scope="module")
def checked():
    """A second copy of opd.objectives whose signatures are enforced; the usual one is put back."""
    originals = {name: module for name, module in sys.modules.items() if name.startswith("opd.objectives")}
    for name in originals:
        del sys.modules[name]
    typing.TYPE_CHECKING = True  # the annotations' names are imported for type checkers only
    try:
        with jaxtyping.install_import_hook("opd.objectives", "beartype.beartype"):
            names = ("divergence", "likelihood", "policy_gradient", "fused")
            copies = {name: importlib.import_module(f"opd.objectives.{name}") for name in names}
    finally:
        typing.TYPE_CHECKING = False
        for name in [name for name in sys.modules if name.startswith("opd.objectives")]:
            del sys.modules[name]
        sys.modules.update(originals)
        opd.objectives = originals["opd.objectives"]
    return copies


def test_well_shaped_arguments_pass(checked):
    logits = torch.randn(3, 5)
    value, metrics = checked["divergence"].generalized_jsd(logits, logits + 1, beta=0.5)
    assert value.shape == metrics["entropy"].shape == (3,)
    gradient = checked["policy_gradient"]
    padded, mask = gradient.pad_rows([torch.randn(2), torch.randn(4)])
    advantages = gradient.reverse_kl_advantages(padded, padded - 1, mask, kl_coef=1.0, kl_discount=0.5)
    assert gradient.center_advantages(advantages, mask).shape == (2, 4)


def test_a_teacher_of_another_vocabulary_is_refused(checked):
    with pytest.raises(jaxtyping.TypeCheckError):
        checked["divergence"].generalized_jsd(torch.randn(3, 5), torch.randn(3, 6), beta=0.5)


def test_a_mask_of_another_shape_is_refused(checked):
    values = torch.randn(2, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked["policy_gradient"].reverse_kl_advantages(values, values, torch.ones(2, 3), kl_coef=1.0, kl_discount=0.0)
