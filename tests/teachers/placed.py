"""What teachers say and what is learnt of them, as one process and as each of two ranks has it."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contract import processes
from contract.tiny import PAD, VOCABULARY, as_needed, make_examples, make_model, make_models, some_of_the_step, train
from contract.variants import VARIANTS, Variant, changed, needs_of, per_micro_batch, tiny_config

from opd.config import Config, LoRA
from opd.data import DataSet
from opd.data.collate import lay_out
from opd.evaluate import Evaluator, MethodLoss
from opd.methods import METHODS
from opd.model_loading import load_local_teacher, place_teacher, shard_student
from opd.models import add_lora, freeze
from opd.objectives import final_logits
from opd.protocols import TokenView
from opd.sharding import gathered, parameter_bytes
from opd.sources import Mixture, Sampling, SequenceSource, sample
from opd.teachers import LocalTeacher, WithoutAdapter, asked_unevenly

VIEWS = [TokenView([3, 9, 4, 7, 11], [False, False, True, True, True]), TokenView([8, 2, 30], [False, True, True])]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {},
    "gemma2": {},
    "mistral": {},
    "qwen3": {},
    "gemma": {},
    "opt": {},
    "gpt_neox": {},
}
ALONE = {variant.method: variant for variant in VARIANTS if variant.label == "defaults"}
GKD = ALONE["gkd"]
PROMPTS = [[3, 9], [4], [8, 2, 30, 5], [6], [7, 7, 7]]
ROWS = 5  # to evaluate: an odd number, so that ranks have different numbers of batches


def has_local_teacher(variant: Variant) -> bool:
    return any(not need.is_student for need in needs_of(variant).teachers.values())


TAUGHT = [variant for variant in VARIANTS if has_local_teacher(variant)]


def world() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def configured(placement: str, variant: Variant = GKD, **sections: Any) -> Config:
    """The variant's config for the ranks that there are; alone a teacher is whole."""
    ranks = world()[1]
    hardware = {"processes_per_node": ranks, "teacher_placement": placement if ranks > 1 else "local"}
    return tiny_config(variant, **{**sections, "hardware": {**hardware, **sections.get("hardware", {})}})


def placed(model: Any, placement: str) -> Any:
    freeze(model)
    place_teacher(model, configured(placement))
    return model


def save_families(folder: Path) -> None:
    for kind, settings in FAMILIES.items():
        make_model(kind, 2, **settings).save_pretrained(folder / kind)


def score(placement: str, folder: Path, kind: str) -> dict[str, Any]:
    """What a teacher that is loaded from a folder says of two sequences, and how much of it lies here."""
    config = configured(placement, train={"packing": kind != "opt"})
    if kind == "gemma2":
        config = changed(config, model={"teacher": config.model.teacher.model_copy(update={"attention": "eager"})})
    teacher = load_local_teacher(config, str(folder / kind), "model.teacher.path", VOCABULARY, None)
    sparse = LocalTeacher(teacher.model, vocab_size=VOCABULARY.size, top_k=4)
    layout = lay_out(VIEWS, pad_id=PAD)
    dense, top = teacher.score(layout, []), sparse.score(layout, [])
    shared = teacher.dense(layout).head.weight is dense.head.weight  # a head is large, and the checks keep many scores
    scored, head = final_logits(dense, slice(None)), weakref.ref(dense.head.weight)
    del dense
    with torch.no_grad():
        logits = teacher.model(input_ids=layout.input_ids, attention_mask=layout.attention_mask).logits
    return {
        "logits": logits,
        "scored": scored,
        "logprobs": teacher.logprobs(layout, [], temperature=0.7),
        "top_k": top.logprobs,
        "ids": top.ids,
        "bytes": parameter_bytes(teacher.model),
        "one_head": shared,
        "head_is_left": head() is not None,
    }


def ask_unevenly(placement: str, folder: Path, kind: str) -> dict[str, Any]:
    """Two teachers, asked thrice by one rank and once by the other; then one that only the first rank asks."""
    teachers = [LocalTeacher(placed(make_model("llama", seed), placement), vocab_size=60) for seed in (2, 3)]
    rank, layout = world()[0], lay_out(VIEWS, pad_id=PAD)
    with asked_unevenly(teachers):
        told = [t.logprobs(layout, []) for _ in range(3 - 2 * rank) for t in teachers]
    with asked_unevenly(teachers[:1]):
        told += [teachers[0].logprobs(layout, [])] if rank == 0 else []
    return {"told": told, "again": [teacher.logprobs(layout, []) for teacher in teachers]}


def draw(placement: str, folder: Path, kind: str) -> dict[str, Any]:
    """{row: its completion}: of five prompts, of one, and of none on a rank; of a teacher and of a mixture."""
    rank, ranks = world()
    teacher, student = placed(make_model("llama", 2), placement), make_model("llama", 1)
    sampling, told = Sampling(9, batch_size=2), {}
    models: list[Any] = [teacher, Mixture(student, teacher, 0.4)]
    for number, model in enumerate(models):
        for first, shares in enumerate((([0, 1, 2, 3], [4]), ([0], []), ([], [1, 2]))):
            mine = shares[rank] if ranks > 1 else [*shares[0], *shares[1]]
            addresses = [(first, "placed", row) for row in mine]
            prompts = [PROMPTS[row] for row in mine]
            with torch.no_grad():
                made = sample(model, prompts, addresses=addresses, sampling=sampling, vocabulary=VOCABULARY)
            told |= {
                (number, first, row): (answer.ids, answer.finished) for row, answer in zip(mine, made, strict=True)
            }
    return told


class Spelling:
    """A tokenizer that can only read ids out."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def evaluate(placement: str, folder: Path, kind: str) -> dict[str, Any]:
    """Everything that evaluation measures, twice, of five rows and of one: then a rank has none."""
    told = {}
    settings = {"batch_size": 2, "sampled": True, "divergence": True, "greedy": True, "divergence_prompts": 64}
    for method, rows in (("gkd", ROWS), ("gkd", 1), ("dckd", ROWS), ("dckd", 1)):
        variant = ALONE[method]
        config = configured(placement, variant, evaluation=settings, train=per_micro_batch(variant, 1))
        made = METHODS[method](config.method)
        examples = [as_needed(example, made.needs) for example in make_examples(rows)]
        models = {key: placed(model, placement) for key, model in make_models(config).items()}
        teachers = {key: LocalTeacher(model, vocab_size=VOCABULARY.size) for key, model in models.items()}
        named: dict[str, Any] = {
            name: teachers[need.model] for name, need in made.needs.teachers.items() if need.model in teachers
        }
        objective = None
        if not made.needs.rollouts:
            source = SequenceSource(
                made,
                student=None,
                teacher=None,
                sampling=Sampling(8),
                vocabulary=VOCABULARY,
                group_size=1,
                seed=0,
            )
            objective = MethodLoss(config, made, VOCABULARY, source, named, torch.device("cpu"))
        evaluator = Evaluator(
            config,
            DataSet(examples, examples, lambda example, text, finished: {"finished": float(finished)}),
            tokenizer=Spelling(),
            vocabulary=VOCABULARY,
            teacher=next(iter(teachers.values())),
            objective=objective,
        )
        student = make_model("llama", 1)
        told |= {f"{method} {rows} {time}: {k}": v for time in (1, 2) for k, v in evaluator(student).metrics.items()}
    return told


def learn(placement: str, folder: Path, variant: Variant) -> dict[str, Any]:
    """One step of a method with every teacher placed; ragged rows, and micro-batches that differ by the ranks."""
    run = {"dir": str(folder / f"{placement}-{world()[1]}")}
    config = configured(placement, variant, train=per_micro_batch(variant, 3), run=run)
    models = {key: placed(model, placement) for key, model in make_models(config).items()}
    told = train(config, models=models, empties=some_of_the_step)
    return {"named": told.named[0], "rollouts": told.rollouts, "gradient": told.gradients[0]}


def lean_on_the_base(placement: str, folder: Path, kind: str) -> dict[str, Any]:
    """The base of a student with an adapter, which is sharded where there are ranks: in its forwards, and gathered."""
    sharding = "fsdp2" if world()[1] > 1 else "ddp"
    config = configured("local", hardware={"sharding": sharding})
    student = add_lora(make_model("llama", 1), LoRA(r=2, alpha=4, dropout=0.1, targets="all-linear"))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    shard_student(config, student, [])
    teacher = LocalTeacher(WithoutAdapter(student), vocab_size=VOCABULARY.size)
    layout, rank = lay_out(VIEWS, pad_id=PAD), world()[0]
    with asked_unevenly([teacher]):
        told = [teacher.logprobs(layout, []) for _ in range(2 - rank)]
    with gathered(student):
        told += [teacher.logprobs(layout, []) for _ in range(rank)]
    return {"told": told}


CASES: dict[str, Callable[[str, Path, Any], dict[str, Any]]] = {
    "score": score,
    "ask_unevenly": ask_unevenly,
    "draw": draw,
    "evaluate": evaluate,
    "learn": learn,
    "lean_on_the_base": lean_on_the_base,
}
Case = tuple[str, str, Any]
"""(name, placement, family or variant)."""


def on_two_ranks(folder: Path, cases: Sequence[Case]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """{case: what each rank tells}, all of it from one pair of processes."""
    return processes.on_two_ranks({key_of(case): functools.partial(_told, case) for case in cases}, folder)


def _told(case: Case, world_size: int, folder: Path) -> dict[str, Any]:
    return alone(folder, case)


def alone(folder: Path, case: Case) -> dict[str, Any]:
    """What one process tells."""
    name, placement, what = case
    return CASES[name](placement, folder, what)


def key_of(case: Case) -> tuple[str, str, str]:
    return case[0], case[1], str(case[2])
