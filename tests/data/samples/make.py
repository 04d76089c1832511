"""Writes the files beside it: invented rows in the columns, layouts and splits of the data sets that presets name.

python tests/data/samples/make.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

HERE = Path(__file__).parent
MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"content": text, "role": role} for role, text in zip(roles, contents, strict=False)]
    return [{"content": system, "role": "system"}, *messages] if system else messages


def sums(*numbers: int) -> list[tuple[str, str]]:
    return [(f"What is {n} plus {n}?", f"{n} plus {n} is {2 * n}.") for n in numbers]


TULU3 = pa.schema([("id", pa.string()), ("messages", MESSAGES), ("source", pa.string())])
DEEPMATH = pa.schema(
    [
        *((name, pa.string()) for name in ("question", "final_answer")),
        ("difficulty", pa.float64()),
        *((name, pa.string()) for name in ("topic", "r1_solution_1", "r1_solution_2", "r1_solution_3")),
    ]
)
CAPYBARA = pa.schema([("source", pa.string()), ("messages", MESSAGES), ("num_turns", pa.int64())])
DEITA = pa.schema([("prompt", pa.string()), ("prompt_id", pa.string()), ("messages", MESSAGES)])
DPO_MIX = pa.schema(
    [
        ("dataset", pa.string()),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_rating", pa.float64()),
        ("rejected_rating", pa.float64()),
    ]
)


def tulu3() -> list[dict]:
    rows = [talk(*pair) for pair in sums(2, 3, 4, 5)]
    rows += [talk("Name a colour.", "Blue.", "Another?", "Green.", system="Be brief."), talk("Say hello.", "Hello!")]
    return [{"id": f"invented_{n}", "messages": row, "source": "invented/rows"} for n, row in enumerate(rows)]


def deepmath() -> list[dict]:
    return [
        {
            "question": f"Evaluate the sum of the first {n} odd numbers.",
            "final_answer": str(n * n),
            "difficulty": 5.0 + n / 2,
            "topic": "Mathematics -> Algebra",
            **{f"r1_solution_{k}": f"Solution {k}: it is {n} squared, \\boxed{{{n * n}}}." for k in (1, 2, 3)},
        }
        for n in (2, 3, 4, 5, 6)
    ]


def capybara(*numbers: int) -> list[dict]:
    rows = [talk(*pair, "Are you sure?", "Yes, I am.") for pair in sums(*numbers)]
    return [{"source": "Invented", "messages": row, "num_turns": len(row) // 2} for row in rows]


def deita(*numbers: int) -> list[dict]:
    rows = [talk(*pair, "And in words?", "As said.") for pair in sums(*numbers)]
    return [{"prompt": row[0]["content"], "prompt_id": f"{n:064x}", "messages": row} for n, row in enumerate(rows)]


def dpo_mix(*numbers: int) -> list[dict]:
    pairs = [(talk(question, answer), talk(question, "I do not know.")) for question, answer in sums(*numbers)]
    if len(pairs) > 2:  # some of the set's conversations have several turns and differ in the last
        asked = talk(*sums(9)[0], "Are you sure?")
        pairs.append((asked + talk("", "Yes.")[1:], asked + talk("", "No.")[1:]))
    told = {"dataset": "invented/pairs", "chosen_rating": 5.0, "rejected_rating": 1.0}
    return [{**told, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]


def opsd() -> list[dict]:
    system = "Edit the text."
    return [
        {
            "id": str(n),
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "privileged_messages": [
                {"role": "assistant", "content": f"A draft: {n}."},
                {"role": "user", "content": f"The checker says: it should be {2 * n}."},
            ],
            "teacher_messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"A draft: {n}."},
                {"role": "user", "content": f"The checker says: it should be {2 * n}."},
            ],
        }
        for n, (question, answer) in zip((2, 3, 4, 5), sums(2, 3, 4, 5), strict=True)
    ]


SETS = {
    "tulu3": (TULU3, {"train": tulu3()}),
    "deepmath": (DEEPMATH, {"train": deepmath()}),
    "capybara": (CAPYBARA, {"train": capybara(2, 3, 4, 5), "test": capybara(6, 2)}),
    "deita_10k": (DEITA, {"train_sft": deita(2, 3, 4, 5), "test_sft": deita(6, 7)}),
    "dpo_mix_7k": (DPO_MIX, {"train": dpo_mix(2, 3, 4), "test": dpo_mix(5, 6)}),
}


def card(splits: list[str]) -> str:
    lines = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{lines}---\nInvented rows; see make.py.\n"


def main() -> None:
    for name, (schema, splits) in SETS.items():
        folder = HERE / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "README.md").write_text(card(list(splits)), encoding="utf-8")
        for split, rows in splits.items():
            parquet.write_table(pa.Table.from_pylist(rows, schema), folder / f"{split}-00000-of-00001.parquet")
    prompts = "".join(f"{question}\n" for question, _ in sums(2, 3, 4, 5, 6))
    (HERE / "prompts.txt").write_text(prompts, encoding="utf-8")
    lines = (json.dumps(row, ensure_ascii=False) for row in opsd())
    (HERE / "opsd_combined_messages.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
