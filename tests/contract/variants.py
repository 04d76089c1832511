"""Every method of conf/method and the option variants it is held to. No torch here.

A method is found by its YAML. Its defaults and every loss_normalization are tested without a word here; the table adds
what else its options can make of it, and `test_configs` fails until a method stands in it. No other file of this suite
names a method.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opd.__main__ import CONF
from opd.conditions import validated
from opd.config import Config
from opd.methods import METHODS as CLASSES
from opd.protocols import Needs

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
NORMALIZATIONS = ("sequence", "sum", "constant")  # "token" is every method's default
PLACEHOLDER = "some/"  # of folders that exist where a command reads them (contract.command), and nowhere else
KEPT = f"{PLACEHOLDER}scores"  # where a variant reads scores that its own teachers gave before


@dataclass(frozen=True)
class Entry:
    """What the suite has to know of a method.

    `falls`: the metric that falls while it learns, in twenty steps to `falls_to` of what it was. `options`: {variant: overrides}. `always`: words for what is not on
    this disk, and what tiny models need. `normalized`: words under which it has every loss_normalization; None: it has
    one alone.
    """

    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    falls: str = "train/loss"
    falls_to: float = 0.8
    always: tuple[str, ...] = ()
    normalized: tuple[str, ...] | None = ()


TABLE: dict[str, Entry] = {
    "sft": Entry({"last_turn": ("method.loss_on=last_assistant",), "every_token": ("method.loss_on=all",)}),
    "gkd": Entry(
        {
            "on_policy_forward": ("method.lmbda=1", "method.beta=0"),
            "off_policy_reverse": ("method.lmbda=0", "method.beta=1"),
            "teacher_samples": ("method.seq_kd=true",),
            "soft": ("method.kd_temperature=2.0",),
            "top_k": ("model.teacher.top_k=5",),
        }
    ),
    "dpo": Entry(
        {
            "smoothed": ("method.label_smoothing=0.1",),
            "averaged": ("method.average_log_prob=true", "method.beta=1.0"),
            "without_reference": ("method.reference_free=true",),
            "with_sft": ("method.sft_weight=1.0",),
            "precomputed": ("method.precompute_reference=true",),
        },
        normalized=None,  # a mean over pairs, always
    ),
    "dckd": Entry(
        {
            "top_k": ("method.top_k=5",),
            "kept_scores": ("method.top_k=5", f"method.dpo_teacher={KEPT}"),
            "released": ("method.top_k=5", "method.released_quirks=true"),
            "rejected_only": (
                "method.sft_on_chosen=0",
                "method.chosen_distil_weight=0",
                "method.rejected_distil_weight=1",
            ),
        }
    ),
    "adpa": Entry(
        {
            "kept_scores": (f"method.scores={KEPT}",),
            "fresh_responses": ("method.responses=student",),
            "top_k_clipped": ("method.top_k=5", "method.advantage_clip=[-1,1]"),
            "released": ("method.top_k=5", "method.released_quirks=true"),
            "every_term": (
                "method.dpo_weight=1",
                "method.kl_penalty_weight=0.1",
                "method.distillation_weight=1",
                "method.chosen_distil_weight=0.1",
                "method.rejected_distil_weight=0.1",
            ),
        },
        always=(  # what its stages would make
            "method.scores=null",
            f"method.dpo_teacher={PLACEHOLDER}dpo_teacher",
            f"method.ref_teacher={PLACEHOLDER}ref_teacher",
            f"data.responses={PLACEHOLDER}responses",
            "model.student.init=null",
        ),
    ),
    "gold": Entry(
        {
            "with_stop_tokens": ("method.skip_student_eos=false", "method.skip_teacher_eos=false"),
            "hybrid_with_nll": ("method.hybrid=true", "method.ce_weight=0.1"),
            "observed": ("method.hybrid=true", "method.merge=observed"),
            "positions": ("method.hybrid=true", "method.extended=false"),
            "one_tokenizer_reverse": (
                f"model.teacher.path={PLACEHOLDER}teacher",
                "method.use_uld_loss=false",
                "method.beta=1",
                "method.seq_kd=true",
            ),
        },
        falls_to=0.95,  # sorted probabilities soon are as alike as they get
        always=(f"model.teacher.path={PLACEHOLDER}foreign_teacher",),
        normalized=(f"model.teacher.path={PLACEHOLDER}teacher", "method.use_uld_loss=false"),
    ),
    "opsd": Entry(
        {
            "initial_teacher": ("method.teacher_mode=initial", "method.beta=0"),
            "averaged_teacher": ("method.teacher_mode=ema", "method.ema_decay=0.9"),
            "clipped": ("method.token_clip=0.05", "method.beta=0"),
            "top_k": ("method.top_k=4", "method.kd_temperature=1.1"),
            "off_policy": ("method.lmbda=0",),
            "sampled_token": ("method.loss=sampled_token",),
        },
        falls="train/reverse_kl",
    ),
    "minillm": Entry(
        {
            "discounted": ("method.gamma=0.95", "method.single_step_decomposition=false"),
            "single_step_soft": ("method.rkl_advantage=false", "method.kd_temperature=2.0"),
            "substeps": ("method.num_substeps=2", "method.gamma=0.5"),
            "paper": ("method.mode=paper",),
            "paper_with_corpus": ("method.mode=paper", "method.lm_coef=1.0"),
            "lmops": ("method.mode=lmops",),
        },
        falls="train/reverse_kl",
    ),
    "reverse_kl": Entry(
        {
            "discounted_centred": ("method.kl_discount=0.95", "method.center_advantages=true"),
            "substeps": ("method.num_substeps=2",),
            "plain_gradient": ("method.importance_ratio=false",),
            "clipped_groups": ("method.clip_epsilon=0.2", "rollout.group_size=4", "train.batch_size=4"),
        },
        falls="train/reverse_kl",
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
    def entry(self) -> Entry:
        """The table's row of the method."""
        return TABLE.get(self.method, Entry())

    @property
    def words(self) -> tuple[str, ...]:
        """Everything that is said beside what holds for all methods; folders are placeholders."""
        return (*self.entry.always, *self.overrides)


def _normalizations() -> list[Variant]:
    return [
        Variant(method, f"per_{kind}", (*words, f"method.loss_normalization={kind}"))
        for method in METHODS
        if (words := TABLE.get(method, Entry()).normalized) is not None
        for kind in NORMALIZATIONS
    ]


DEFAULTS = [Variant(method, "defaults") for method in METHODS]
VARIANTS = [
    variant
    for default in DEFAULTS
    for variant in (default, *(Variant(default.method, *option) for option in default.entry.options.items()))
]
ALL_VARIANTS = VARIANTS + _normalizations()


def compose(*overrides: str) -> dict[str, Any]:
    """The resolved config, as the command composes it."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("config", overrides=list(overrides))
    raw: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return raw


def run_alone(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of the run itself, without the stages it would be preceded by."""
    return {section: values for section, values in raw.items() if section != "stages"}


@cache
def _composed(method: str, overrides: tuple[str, ...]) -> Config:
    return validated(run_alone(compose(f"method={method}", *overrides)))


# Rows and models of one's own, which are never read, so that no method is tuned; small enough for sixteen prompts of
# a few tokens, in one micro-batch. What a variant sets comes last.
TINY = (
    "data=file",
    f"data.path={CONF / 'config.yaml'}",
    "model/student=path",
    f"model.student.path={PLACEHOLDER}student",
    "model/teacher=path",
    f"model.teacher.path={PLACEHOLDER}teacher",
    "hardware=cpu_tiny",
    "train.batch_size=16",
    "train.micro_batch_size=64",
    "train.optimizer=adamw",
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
    return changed(_composed(variant.method, (*TINY, *variant.words)), **sections)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with other values; a key that a section does not have is left out."""
    update = {}
    for name, values in sections.items():
        section = getattr(config, name)
        known = {key: value for key, value in values.items() if key in type(section).model_fields}
        update[name] = section.model_copy(update=known)
    return config.model_copy(update=update)


def method_needs(config: Config) -> Needs:
    """What the config's method asks for."""
    return CLASSES[config.method.name](config.method).needs


def needs_of(variant: Variant) -> Needs:
    """What the variant asks for."""
    return method_needs(tiny_config(variant))


def per_micro_batch(variant: Variant, num_rows: int) -> dict[str, int]:
    """The section `train` that puts this many rows into a micro-batch, whatever a row is made into."""
    return {"micro_batch_size": num_rows * len(needs_of(variant).sequences)}
