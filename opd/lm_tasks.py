"""Tasks of lm-eval (EleutherAI's harness), put to the student that is in memory: known names, and task files.

Importing this costs seconds, so a run does it only where `evaluation.lm_eval.tasks` asks for it.
"""

from __future__ import annotations

import copy
import difflib
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from opd import distributed
from opd.config import Config
from opd.errors import ConfigError
from opd.models import causal_lm, evaluation_mode
from opd.tokenizers import first_line

log = logging.getLogger("opd")
_KEY = "evaluation.lm_eval.tasks"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": None}
_END_OF_THOUGHT = "</think>"


class TaskScores(NamedTuple):
    """`metrics` by "lm_eval/TASK/METRIC", and a record for each document and filter, by task and document.

    Both are empty on ranks other than 0.
    """

    metrics: dict[str, float]
    documents: list[dict[str, Any]]


class LmTasks:
    """The tasks of the config, loaded, with their documents; calling it puts them to a model."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        """Raises ConfigError for a task that is unknown, or whose documents or prompts cannot be made."""
        self._config, self._settings = config, config.evaluation.lm_eval
        # lm-eval gives it a padding token; training's own stays what it is.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._templated = self._settings.chat_template and tokenizer.chat_template is not None
        self._system_prompt = config.data.system_prompt if self._templated else None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with _own_randomness(config.run.seed):
            self._loaded = self._load()
            for name, task in self._loaded["tasks"].items():
                self._refuse(name, task)

    def __call__(self, model: Any) -> TaskScores:
        """Every rank answers its share of the documents. Collective; neither weights nor RNG states are touched."""
        inner = causal_lm(model)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(self._config.run.seed)  # or examples after training would not be those before it
        with evaluation_mode(inner), _own_randomness(self._config.run.seed):
            results: Any = evaluate(
                _InMemory(self._config, inner, self._tokenizer),
                self._loaded,
                limit=self._settings.limit,
                bootstrap_iters=0,  # it would start processes; every document's score is kept instead
                system_instruction=self._system_prompt,
                apply_chat_template=self._templated,
                fewshot_as_multiturn=True,
            )
        if results is None:
            return TaskScores({}, [])
        metrics = {
            f"lm_eval/{task}/{_plain(key)}": float(value)
            for task, found in sorted(results["results"].items())
            for key, value in found.items()
            if "," in key and isinstance(value, int | float | np.number)
        }
        records = [_record(task, sample) for task, samples in results["samples"].items() for sample in samples]
        return TaskScores(metrics, sorted(records, key=lambda r: (r["task"], r["document"], r["filter"])))

    def _load(self) -> dict[str, Any]:
        """Tasks and groups as lm-eval holds them, with as many few-shot examples as are asked for."""
        names = list(dict.fromkeys(self._settings.tasks))
        # Indexing its own tasks takes lm-eval many seconds.
        manager = TaskManager(include_defaults=not all(_is_file(name) for name in names))
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            found = _found(manager, name)
            if again := loaded["tasks"].keys() & found["tasks"].keys():
                raise ConfigError(f"{_KEY}={names}: {min(again)} is in it twice; name it once")
            for kind, parts in loaded.items():
                parts |= found.get(kind, {})
        for name, task in loaded["tasks"].items():
            own, asked = task.get_config("num_fewshot"), self._settings.num_fewshot
            if own == 0 and asked:
                log.warning("evaluation.lm_eval.num_fewshot=%d: the task %s says 0, and keeps it", asked, name)
            elif asked is not None or own is None:
                task.set_config(key="num_fewshot", value=asked or 0)
        return loaded

    def _refuse(self, name: str, task: Any) -> None:
        """What would fail only after training began: seen on one document."""
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            reason = "runs code that the model writes" if task.UNSAFE_CODE else "needs images or sound"
            raise ConfigError(f"{_KEY}={name}: it {reason}; put it to final_model with lm-eval itself")
        # It says so to its log alone, and then measures nothing.
        metrics = {} if task.get_config("process_results") else getattr(task, "_metric_fn_list", {})
        if unknown := [metric for metric, function in metrics.items() if function is None]:
            raise ConfigError(f"{_KEY}={name}: lm-eval has no metric {unknown[0]}; mend its metric_list")
        try:
            ranks, documents = distributed.world_size(), len(task.eval_docs)
            task.set_fewshot_seed(self._config.run.seed)
            with redirect_stderr(StringIO()):  # its progress bar
                task.build_all_requests(
                    limit=1,
                    system_instruction=self._system_prompt,
                    apply_chat_template=self._templated,
                    fewshot_as_multiturn=True,
                    chat_template=self._render if self._templated else None,
                )
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(f"{_KEY}={name}: no prompt comes of its first document ({what}); mend the task") from None
        if min(documents, self._settings.limit or documents) < ranks:
            setting = f"evaluation.lm_eval.limit={self._settings.limit}"
            raise ConfigError(
                f"{setting}: {ranks} processes share the {documents} documents of {name}, at least one each; "
                "raise it, or use one process"
            )

    def _render(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


_HFLM: Any = HFLM  # its registration hides what it takes from type checkers


class _InMemory(_HFLM):
    """A loaded model that shares the documents with the other ranks by their own process group."""

    def __init__(self, config: Config, model: Any, tokenizer: Any) -> None:
        thinking = config.model.student.thinking
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=config.evaluation.batch_size,
            enable_thinking=thinking,
            think_end_token=_END_OF_THOUGHT if thinking else None,
            mixed_precision_dtype=_DTYPES[config.hardware.precision],  # it leaves an outer autocast
        )
        self._rank, self._world_size = distributed.rank(), distributed.world_size()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Numbers of all ranks, by rank."""
        return torch.tensor(distributed.everyones(tensor.tolist())).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every rank's object, on rank 0."""
        return distributed.gather(obj) or None

    def barrier(self) -> None:
        """Wait until every rank is here."""
        distributed.barrier()


def _found(manager: TaskManager, name: str) -> Any:
    """The tasks of this name or file: one, or those of a group or a tag."""
    if not _is_file(name) and name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.6)
        remedy = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists them; or name a task's YAML file"
        raise ConfigError(f"{_KEY}={name}: lm-eval has no such task; {remedy}")
    try:
        return manager.load([name])
    except Exception as error:  # a task's file and its data set fail in many ways
        remedy = "mend the file" if _is_file(name) else "fetch it once while online, or name a file of your own"
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{_KEY}={name}: cannot be loaded ({what}); {remedy}") from None


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _plain(key: str) -> str:
    """acc of "acc,none", exact_match/strict-match of "exact_match,strict-match": names that every tracker takes."""
    metric, _, chosen = key.partition(",")
    return metric if chosen == "none" else f"{metric}/{chosen}"


def _record(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    scores = {name: sample[name] for name in sample["metrics"]}
    kept = {"task": task, "document": int(sample["doc_id"]), "filter": sample["filter"], "target": sample["target"]}
    return {**kept, "answers": sample["filtered_resps"], **scores}


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Global RNGs seeded for what is done inside, and then as they were."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
