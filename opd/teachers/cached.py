"""A teacher that is not here: the scores that it once gave to the same sequences, kept in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.artifacts.folders import SCORES
from opd.errors import ConfigError, RunError
from opd.protocols import Layout, Sparse, TokenSequence
from opd.teachers.base import Teacher

_TENSORS = "scores.safetensors"


def write_scores(
    folder: Path, sequences: Sequence[TokenSequence], scored: Mapping[str, Sequence[Tensor | Sparse]], facts: dict
) -> None:
    """Keep what teachers said of these sequences, each one's loss tokens: {teacher: one entry a sequence}.

    An entry is (tokens,) log-probabilities of the tokens, or Sparse scores, on the same ids for all teachers. They are
    found again by the ids and the loss mask that were scored, never by a row number.
    """
    tensors: dict[str, Tensor] = {}
    for name, entries in scored.items():
        sparse = [entry for entry in entries if isinstance(entry, Sparse)]
        if sparse:
            tensors["ids"] = torch.cat([entry.ids for entry in sparse]).to(torch.int32)
            tensors[f"{name}_tail"] = torch.cat([entry.tail for entry in sparse]).float()
            tensors[name] = torch.cat([entry.logprobs for entry in sparse]).float()
        else:
            tensors[name] = torch.cat([entry for entry in entries if isinstance(entry, Tensor)]).float()
    index = [(_address(sequence), sequence.num_loss_tokens) for sequence in sequences]
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / _TENSORS)
    (folder / SCORES).write_text(json.dumps({**facts, "teachers": list(scored), "sequences": index}), encoding="utf-8")


class CachedTeacher(Teacher):
    """What the teacher `name` said, from the folder that `write_scores` wrote. `key` names the setting in errors."""

    is_kept = True

    def __init__(self, folder: Path, name: str, *, device: torch.device, key: str) -> None:
        try:
            facts = json.loads((folder / SCORES).read_text(encoding="utf-8"))
            self._tensors: dict[str, Tensor] = load_file(folder / _TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"{key}={folder}: no scores lie there ({first}); make them with mode=scores") from None
        if name not in facts["teachers"]:
            held = ", ".join(facts["teachers"])
            raise ConfigError(f"{key}={folder}: holds scores of {held}, not of {name}; make them with mode=scores")
        self.top_k: int = facts["top_k"]  # 0: log-probabilities of the sequences' own tokens alone
        self._name, self._device, self._setting = name, device, f"{key}={folder}"
        self._places, start = {}, 0
        for address, length in facts["sequences"]:
            self._places[address] = slice(start, start + length)
            start += length

    def score(self, layout: Layout, sequences: Sequence[TokenSequence]) -> Sparse:
        """The kept ids, their log-probabilities and the rest's mass."""
        ids, logprobs, tail = (self._gather(name, sequences) for name in ("ids", self._name, f"{self._name}_tail"))
        return Sparse(ids.long(), logprobs, tail)

    def logprobs(self, layout: Layout, sequences: Sequence[TokenSequence], *, temperature: float = 1.0) -> Tensor:
        """log p(targets[n]), (N,)."""
        if temperature != 1.0:
            raise RunError(f"{self._setting}: holds log-probabilities at temperature 1, not {temperature}")
        return self._gather(self._name, sequences)

    def check(self, sequences: Sequence[TokenSequence]) -> None:
        """Raises ConfigError if it was never asked about one of these."""
        unknown = next((sequence for sequence in sequences if _address(sequence) not in self._places), None)
        if unknown is not None:
            raise ConfigError(
                f"{self._setting}: has no scores of the {unknown.kind} completion of row {unknown.row} as this run "
                "reads it (another tokenizer, template, length limit or response); make them again with mode=scores"
            )

    def _gather(self, name: str, sequences: Sequence[TokenSequence]) -> Tensor:
        self.check(sequences)
        return torch.cat([self._tensors[name][self._places[_address(s)]] for s in sequences]).to(self._device)


def _address(sequence: TokenSequence) -> str:
    view = sequence.student_view
    text = json.dumps([view.ids, view.loss_mask])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
