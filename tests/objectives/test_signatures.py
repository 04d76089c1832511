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
            names = ("divergence", "likelihood", "policy_gradient", "fused", "preference", "uld")
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
    value, metrics = checked["divergence"].generalized_jsd(logits, logits + 1, beta=0.5, token_clip=0.1, top_k=2)
    assert value.shape == metrics["clip_fraction"].shape == (3,)
    gradient = checked["policy_gradient"]
    padded, mask = gradient.pad_rows([torch.randn(2), torch.randn(4)])
    advantages = gradient.reverse_kl_advantages(padded, padded - 1, mask, kl_coef=1.0, kl_discount=0.5)
    assert gradient.center_advantages(advantages, mask).shape == (2, 4)
    rewards = gradient.log_ratio_rewards(padded, padded - 1, mask, scaling=0.5, clip=1.0)
    returns = gradient.minillm_advantages(rewards, mask, discount=0.5, length_normalization=True, mode="paper")
    assert gradient.whiten(returns, mask).shape == (2, 4)
    assert checked["uld"].sorted_l1(torch.rand(3, 5), torch.rand(3, 7)).shape == (3,)


def test_a_teacher_of_another_vocabulary_is_refused(checked):
    with pytest.raises(jaxtyping.TypeCheckError):
        checked["divergence"].generalized_jsd(torch.randn(3, 5), torch.randn(3, 6), beta=0.5)


def test_a_mask_of_another_shape_is_refused(checked):
    values = torch.randn(2, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        checked["policy_gradient"].reverse_kl_advantages(values, values, torch.ones(2, 3), kl_coef=1.0, kl_discount=0.0)


def test_pairs_are_two_columns_and_as_many_for_the_reference(checked):
    preference, logps = checked["preference"], torch.randn(3, 2)
    assert preference.pair_loss(logps, logps, beta=0.1).shape == (3,)
    for reference in (torch.randn(4, 2), torch.randn(3, 1)):
        with pytest.raises(jaxtyping.TypeCheckError):
            preference.pair_loss(logps, reference, beta=0.1)
