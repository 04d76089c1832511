"""What a later stage reads instead of a model: answers to the prompts, and what teachers say of kept sequences."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd import distributed
from opd.artifacts.console import Progress
from opd.artifacts.store import Store, source_version
from opd.config import Config
from opd.data.responses import RESPONSES, write_response
from opd.loading import Texts, all_sequences
from opd.model_loading import device_of, student_dtype
from opd.models import computing
from opd.objectives import scores_on, top_k_scores
from opd.protocols import Method, Sparse
from opd.sources import Sampling, SequenceSource, sample
from opd.teachers import CachedTeacher, Teacher, asked_unevenly, write_scores
from opd.window import Batches

log = logging.getLogger("opd")
Part = TypeVar("Part")


def make_responses(config: Config, texts: Texts, student: Any) -> int:
    """One answer of the student to every training prompt, in run.dir/responses.jsonl; how many tokens were sampled.

    Every rank writes its share, and what a killed run of as many ranks has written is not sampled again.
    """
    folder, rollout = Path(config.run.dir), config.rollout
    part = folder / f".responses-{distributed.rank()}-of-{distributed.world_size()}.jsonl"
    rows = [texts.data.train[i] for i in range(distributed.rank(), len(texts.data.train), distributed.world_size())]
    done = _whole_lines(part)
    # The rest of a batch is sampled with it again: beside other rows an answer may differ in the last bit.
    done = done if len(done) == len(rows) else done[: len(done) - len(done) % rollout.batch_size]
    part.write_text("".join(f"{line}\n" for line in done), encoding="utf-8")
    if done:
        log.info("%d of %d responses are there already", len(done), len(rows))
    sampling = Sampling.of(rollout)
    progress = Progress("responses", len(rows), len(done))
    with part.open("a", encoding="utf-8") as file:
        for start in range(len(done), len(rows), rollout.batch_size):
            chunk = rows[start : start + rollout.batch_size]
            addresses = [(config.run.seed, "responses", row.row) for row in chunk]
            prompts = [row.prompt_ids for row in chunk]
            with computing(config.hardware):
                answers = sample(student, prompts, addresses=addresses, sampling=sampling, vocabulary=texts.vocabulary)
            for row, answer in zip(chunk, answers, strict=True):
                file.write(write_response(row, answer.ids, answer.finished, texts.tokenizer) + "\n")
            file.flush()
            progress.show(start + len(chunk), {})
    progress.close()
    parts = distributed.gather(_whole_lines(part))
    distributed.barrier()
    if distributed.rank() == 0:
        lines = sorted((line for lines in parts for line in lines), key=lambda line: json.loads(line)["row"])
        (folder / RESPONSES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    distributed.barrier()
    part.unlink()
    tokens = sum(len(json.loads(line)["completion_ids"]) for lines in parts for line in lines)
    return tokens if distributed.rank() == 0 else 0


def make_scores(
    config: Config, method: Method, texts: Texts, source: SequenceSource, teachers: Mapping[str, Teacher]
) -> int:
    """What the method's teachers say of every row's sequences, in run.dir; how many tokens were scored.

    The ids are the first teacher's method.top_k likeliest, and the others' log-probabilities are of the same ids.
    """
    top_k = config.at("method.top_k")
    asked = method.needs.asked(config.mode)
    kinds = {kind for need in asked.values() for kind in need.kinds or method.needs.sequences}
    sequences = [sequence for sequence in all_sequences(texts.data, source) if sequence.kind in kinds]
    batches = Batches(config, method, vocabulary=texts.vocabulary, device=device_of(config))
    mine = _share(batches.parts(sequences))
    scored: list[dict[str, list[Sparse]]] = []
    progress = Progress("scores", len(mine))
    with asked_unevenly(teachers[name] for name in asked):
        for part in mine:
            layout, ids = batches.batch(part).layout, None
            lengths = [sequence.num_loss_tokens for sequence in part]
            scored.append({})
            for name in asked:
                dense = teachers[name].dense(layout)  # type: ignore[attr-defined]
                sparse = top_k_scores(dense, top_k) if ids is None else scores_on(dense, ids)
                ids = sparse.ids
                columns = (column.cpu().split(lengths) for column in (sparse.ids, sparse.logprobs, sparse.tail))
                scored[-1][name] = [Sparse(*entry) for entry in zip(*columns, strict=True)]
            progress.show(len(scored), {})
    progress.close()
    folder = Path(config.run.dir)
    shares = _gathered(folder, scored)
    if distributed.rank() == 0:
        everything = _in_order(shares)
        entries = {name: [entry for part in everything for entry in part[name]] for name in asked}
        write_scores(folder, sequences, entries, {"top_k": top_k})
    distributed.barrier()
    return sum(sequence.num_loss_tokens for sequence in sequences) * len(asked)


def keep_logprobs(
    config: Config, method: Method, texts: Texts, source: SequenceSource, name: str, teacher: Teacher
) -> CachedTeacher:
    """A teacher that is asked for log-probabilities alone, asked about every row now and let go.

    The answers lie in artifacts.dir under the digest of the weights and of the sequences, so that neither another
    model, tokenizer, template nor length limit ever finds them.
    """
    sequences = all_sequences(texts.data, source)
    store = Store(Path(config.artifacts.dir))
    path = config.model.student.path
    assert path is not None
    recipe = {
        "teacher": name,
        "model": store.content_digest(Path(path)) if Path(path).is_dir() else path,
        "revision": config.model.student.revision,
        "dtype": str(student_dtype(config)),
        "quantization": config.model.student.quantization,
        "precision": config.hardware.precision,
        "sequences": _digest([[s.prompt_ids, s.completion_ids, s.completion_mask] for s in sequences]),
        "code": source_version(("precompute.py", "models.py", "quantization.py", "teachers", "objectives/fused.py")),
    }
    batches = Batches(config, method, vocabulary=texts.vocabulary, device=device_of(config))
    address = store.address("logprobs", recipe)
    if distributed.maximum(torch.tensor(float(store.find("logprobs", recipe) is None))):
        log.info("%s: log-probabilities of %d sequences are kept in %s", name, len(sequences), address)
        scored: list[list[Tensor]] = []
        with asked_unevenly([teacher]):
            for part in _share(batches.parts(sequences)):
                values = teacher.logprobs(batches.batch(part).layout, part).cpu()
                scored.append(list(values.split([sequence.num_loss_tokens for sequence in part])))
        everything = _in_order(distributed.gather(scored))

        def make(folder: Path) -> None:
            entries = [entry for part in everything for entry in part]
            write_scores(folder, sequences, {name: entries}, {"top_k": 0})

        if distributed.rank() == 0:
            store.get_or_make("logprobs", recipe, make)
        distributed.barrier()
    return CachedTeacher(address, name, device=device_of(config), key="method")


def _share(parts: list[Part]) -> list[Part]:
    """What this rank takes of them."""
    return parts[distributed.rank() :: distributed.world_size()]


def _in_order(shares: list[list[Part]]) -> list[Part]:
    """All ranks' shares put together again."""
    return [part for together in zip_longest(*shares) for part in together if part is not None]


def _gathered(folder: Path, share: list[Part]) -> list[list[Part]]:
    """Every rank's share, on rank 0; through files, for a message between ranks is held several times."""
    if distributed.world_size() == 1:
        return [share]
    file = folder / f".share-{distributed.rank()}.pt"
    torch.save(share, file)
    distributed.barrier()
    shares: list[list[Part]] = []
    if distributed.rank() == 0:
        files = [folder / f".share-{rank}.pt" for rank in range(distributed.world_size())]
        shares = [torch.load(other, weights_only=False) for other in files]
    distributed.barrier()
    file.unlink()
    return shares


def _whole_lines(file: Path) -> list[str]:
    """The lines that a kill left whole."""
    return file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
