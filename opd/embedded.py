"""The embedded task's own models: trained by the project's sft on first use, kept by content, reused afterwards."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from opd.artifacts.console import Progress
from opd.artifacts.store import Store, source_version
from opd.config import Config, WalkRecipe
from opd.data import walk_corpus, walk_tokenizer
from opd.methods.sft import SFT
from opd.models import build_walk_model
from opd.sources import Sampling, SequenceSource
from opd.tokenizers import Vocabulary
from opd.trainer import DistillationTrainer

log = logging.getLogger("opd")

# Everything that decides what a recipe becomes, this file included.
_CODE = (
    "embedded.py",
    "data/walk_corpus.py",
    "data/walk_rules.py",
    "data/walk_text.py",
    "data/walk_tokenizer.py",
    "models.py",
    "tokenizers.py",
    "methods/sft.py",
    "objectives/likelihood.py",
    "objectives/fused.py",
    "window.py",
    "trainer.py",
)


def ensure_models(config: Config) -> Config:
    """The config with a path for every model that had only a recipe."""
    store = Store(Path(config.artifacts.dir))
    found = {}
    for role in ("student", "teacher"):
        model = getattr(config.model, role)
        if model.path is None and model.recipe is not None:
            model = model.model_copy(update={"path": str(_walk_model(store, role, model.recipe, config))})
        found[role] = model
    return config.model_copy(update={"model": config.model.model_copy(update=found)})


def _walk_model(store: Store, role: str, recipe: WalkRecipe, config: Config) -> Path:
    """Folder of the walk model of this recipe, which may have been made for the other role."""
    content = {"recipe": recipe.model_dump(), "code": source_version(_CODE)}
    other = store.find("walk-teacher" if role == "student" else "walk-student", content)
    if other is not None:
        return other

    def make(folder: Path) -> None:
        log.info(
            "the walk %s is not kept yet in %s: it is trained once, and reused afterwards",
            role,
            config.artifacts.dir,
        )
        _train(folder, role, recipe, config)

    return store.get_or_make(f"walk-{role}", content, make)


def _train(folder: Path, role: str, recipe: WalkRecipe, config: Config) -> None:
    tokenizer = walk_tokenizer.build_tokenizer(recipe.vocab_size)
    model = build_walk_model(recipe, tokenizer)
    corpus = walk_corpus.WalkCorpus(
        tokenizer,
        recipe.steps * recipe.batch_size,
        recipe.seed,
        detour_probability=recipe.detour_probability,
        hint_probability=recipe.hint_probability,
    )
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    vocabulary = Vocabulary(len(tokenizer), frozenset({int(eos)}), int(pad))  # type: ignore[arg-type]
    method = SFT(SFT.Config(name="sft", loss_on="assistant"))
    progress = Progress(f"walk {role}", recipe.steps)
    with tempfile.TemporaryDirectory() as scratch:
        own = _own_config(config, method, recipe, scratch)
        source = SequenceSource(
            method,
            student=model,
            teacher=None,
            sampling=Sampling(1),
            vocabulary=vocabulary,
            group_size=1,
            seed=recipe.seed,
        )
        DistillationTrainer(
            own,
            model,
            method,
            tokenizer=tokenizer,
            examples=corpus,
            source=source,
            teachers={},
            vocabulary=vocabulary,
            max_steps=recipe.steps,
            on_step=lambda step, metrics, window: progress.show(step, metrics),
        ).train()
    progress.close()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _own_config(config: Config, method: SFT, recipe: WalkRecipe, scratch: str) -> Config:
    """The run's config, bent to the recipe: one process on the CPU, no checkpoints."""
    train: dict[str, Any] = {
        "max_steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "micro_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "optimizer": "adamw",
        "adam_betas": (0.9, 0.98),
        "weight_decay": 0.01,
        "lr_scheduler": "cosine",
        "warmup_steps": 20,
        "min_lr_ratio": 0.05,
        "max_grad_norm": 1.0,
        "save_every_steps": 0,
        "log_every_steps": 1,
    }
    hardware = {"device": "cpu", "nodes": 1, "processes_per_node": 1, "precision": "fp32", "sharding": "ddp"}
    return config.model_copy(
        update={
            "method": method.config,
            "run": config.run.model_copy(update={"dir": scratch, "seed": recipe.seed}),
            "train": config.train.model_copy(update=train),
            "hardware": config.hardware.model_copy(update=hardware),
            "rollout": config.rollout.model_copy(update={"group_size": 1}),
        }
    )
