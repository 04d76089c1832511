"""Every method of conf/method and the option variants it is held to. No torch here.

A method is found by its YAML. Its defaults and every loss_normalization are tested without a word here; the table adds
what else its options can make of it, and `test_configs` fails until a method stands in it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opd.__main__ import CONF
from opd.conditions import validated
from opd.config import Config

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
NORMALIZATIONS = ("sequence", "sum", "constant")  # "token" is every method's default

# Method -> what falls while it learns, and {variant: overrides}.
TABLE: dict[str, tuple[str, dict[str, list[str]]]] = {
    "sft": ("train/loss", {"last_turn": ["method.loss_on=last_assistant"]}),
    "gkd": (
        "train/loss",
        {
            "on_policy_forward": ["method.lmbda=1", "method.beta=0"],
            "off_policy_reverse": ["method.lmbda=0", "method.beta=1"],
            "teacher_samples": ["method.seq_kd=true"],
            "soft": ["method.kd_temperature=2.0"],
            "top_k": ["model.teacher.top_k=5"],
        },
    ),
    "reverse_kl": (
        "train/reverse_kl",
        {
            "discounted_centred": ["method.kl_discount=0.95", "method.center_advantages=true"],
            "substeps": ["method.num_substeps=2"],
            "plain_gradient": ["method.importance_ratio=false"],
            "clipped_groups": ["method.clip_epsilon=0.2", "rollout.group_size=4", "train.batch_size=4"],
        },
    ),
}


@dataclass(frozen=True)
class Variant:
    """A method as its overrides make it."""

    method: str
    label: str
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method}-{self.label}"

    @property
    def objective(self) -> str:
        """The metric that falls while it learns."""
        return TABLE.get(self.method, ("train/loss", {}))[0]


def _variants() -> list[Variant]:
    found = []
    for method in METHODS:
        _, options = TABLE.get(method, ("", {}))
        found.append(Variant(method, "defaults"))
        found += [Variant(method, label, tuple(overrides)) for label, overrides in options.items()]
    return found


VARIANTS = _variants()
ALL_VARIANTS = VARIANTS + [
    Variant(method, f"per_{kind}", (f"method.loss_normalization={kind}",))
    for method in METHODS
    for kind in NORMALIZATIONS
]


def compose(*overrides: str) -> dict[str, Any]:
    """The resolved config, as the command composes it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("config", overrides=list(overrides))
    raw: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return raw


@cache
def _composed(method: str, overrides: tuple[str, ...]) -> Config:
    return validated(compose(f"method={method}", *overrides))


# Rows and models of one's own, which are never read, so that no method is tuned; small enough for sixteen sequences of
# a few tokens. What a variant sets comes last.
TINY = (
    "data=file",
    f"data.path={CONF / 'config.yaml'}",
    "model/student=path",
    "model.student.path=some/student",
    "model/teacher=path",
    "model.teacher.path=some/teacher",
    "hardware=cpu_tiny",
    "train.batch_size=16",
    "train.micro_batch_size=16",
    "train.learning_rate=0.01",
    "train.lr_scheduler=constant",
    "train.warmup_steps=0",
    "train.warmup_ratio=0",
    "train.max_grad_norm=0",
    "train.save_every_steps=0",
    "rollout.max_completion_tokens=8",
    "rollout.group_size=1",
    "rollout.temperature=1.0",
    "rollout.top_p=1.0",
    f"run.dir={tempfile.mkdtemp(prefix='opd-contract-')}",
)


def tiny_config(variant: Variant, **sections: dict[str, Any]) -> Config:
    """The variant's config for tiny models; `sections` replaces keys of a section, e.g. train={"batch_size": 4}."""
    config = _composed(variant.method, (*TINY, *variant.overrides))
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


ROOT = Path(__file__).resolve().parents[2]
