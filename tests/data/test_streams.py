"""Rows read as training reaches them: one stream, addressed by number and seed."""

import json
from collections import Counter

import pytest
from own_rows import SAMPLES, loaded, questions, refused, rows_of, write_lines

from opd.data import StreamedExamples
from opd.data.readers import Row
from opd.data.stream import shuffled
from opd.randomness import generator
from opd.window import RowOrder

SFT = ("method=sft", "model/teacher=none", "data.streaming=true", "data.eval_prompts=0", "train.batch_size=4")


@pytest.fixture
def stream(tmp_path):
    def stream(rows, *words, steps=5):
        path = write_lines(tmp_path / "rows.jsonl", rows)
        return loaded(*SFT, "data=file", f"data.path={path}", f"train.max_steps={steps}", *words)

    return stream


def numbers(examples):
    return [row.fields["n"] for row in rows_of(examples)]


def test_a_pass_holds_every_row_once_and_the_next_has_another_order(stream):
    data = stream(questions(*range(10)))
    assert isinstance(data.train, StreamedExamples) and len(data.train) == 20
    found = numbers(data.train)
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))
    assert found[:10] != found[10:] and found[:10] != list(range(10))


def test_the_order_is_the_seeds_and_every_row_its_numbers(stream):
    rows = questions(*range(30))
    whole = numbers(stream(rows).train)
    assert whole == numbers(stream(rows).train) != numbers(stream(rows, "run.seed=1").train)
    resumed = stream(rows).train
    assert [resumed[n].fields["n"] for n in (13, 14, 2, 19)] == [whole[n] for n in (13, 14, 2, 19)]


def test_a_row_moves_within_the_buffer_and_no_more_rows_wait_than_it_holds():
    read = []

    def rows():
        for n in range(200):
            read.append(n)
            yield Row(n, {})

    waiting, order = [], []
    for row in shuffled(rows(), 8, generator(0, "test")):
        order.append(row.number)
        waiting.append(len(read) - len(order))
    assert sorted(order) == list(range(200)) and order != list(range(200))
    assert max(waiting) <= 8
    assert all(number <= place + 8 for place, number in enumerate(order))


def test_memory_does_not_grow_with_the_data(tmp_path):
    """What is held while reading far into a file is the buffer, not the file."""
    import tracemalloc

    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for n in range(1000):
            row = {"prompt": f"What is {n}?", "completion": f"{n}.", "n": n, "more": "x" * 10_000}
            file.write(json.dumps(row) + "\n")
    words = ("data=file", f"data.path={path}", "data.shuffle_buffer=10", "train.max_steps=250")
    train = loaded(*SFT, *words).train
    train[0]
    tracemalloc.start()
    train[900]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 < path.stat().st_size / 5


def test_training_takes_the_streams_own_order(stream):
    data = stream(questions(*range(10)))
    order = RowOrder(data.train, seed=0)
    rows, _ = order.rows(range(4, 8))
    assert [(number, row.fields["n"]) for number, row in rows] == list(enumerate(numbers(data.train)))[4:8]


def test_what_was_dropped_and_cut_is_told_of_the_rows_that_a_step_read(stream):
    long, cut = {"prompt": "long " * 40, "completion": "x"}, {"prompt": "cut", "completion": "b " * 40}
    rows = [{**row, "n": n} for n, row in enumerate([long, cut, *questions(2), long, cut, cut])]
    words = ("data.max_prompt_length=30", "data.max_completion_length=20")
    data = stream(rows, *words)
    _, first = RowOrder(data.train, seed=0).rows(range(2))
    _, second = RowOrder(data.train, seed=0).rows(range(2, 4))
    dropped, read = (sum(part["data/dropped_fraction"][k] for part in (first, second)) for k in (0, 1))
    assert dropped <= 2 and read == dropped + 4  # of a pass over six rows two are too long
    _, passes = RowOrder(data.train, seed=0).rows(range(20))
    assert passes["data/truncated_fraction"][0] == 15 and passes["data/dropped_fraction"][1] >= 28


def test_both_ranks_of_a_step_read_the_same_stream(stream):
    rows = questions(*range(16))
    alone = RowOrder(stream(rows).train, seed=0).rows(range(0, 8))[0]
    first, second = (RowOrder(stream(rows).train, seed=0).rows(range(k, k + 4))[0] for k in (0, 4))
    assert [row for _, row in alone] == [row for _, row in first + second]


def test_evaluation_rows_come_from_the_head_and_their_prompts_are_not_trained_on(stream):
    rows = questions(0, 1, 2, 3, 4, 5, 0)
    data = stream(rows, "data.eval_prompts=2")
    assert [row.fields["n"] for row in data.evaluation] == [0, 1]
    assert set(numbers(data.train)) == {2, 3, 4, 5}


def test_evaluation_rows_may_come_from_a_split(tmp_path):
    words = ("data=capybara", f"data.path={SAMPLES / 'capybara'}", "data.eval_prompts=2", "train.max_steps=3")
    data = loaded(*SFT[:3], *words, "train.batch_size=1")
    assert len(data.evaluation) == 2  # "What is 2 plus 2?" among them, which is then not trained on
    assert Counter(len(row.prompt_ids) > 0 for row in rows_of(data.train)) == {True: 3}
    evaluated = {tuple(row.prompt_ids) for row in data.evaluation}
    assert not evaluated & {tuple(row.prompt_ids) for row in rows_of(data.train)}


def test_a_bad_row_is_refused_when_it_is_reached(stream):
    data = stream([*questions(1, 2), {"prompt": "a", "n": 3}], "data.shuffle_buffer=1")
    from opd.errors import ConfigError

    with pytest.raises(ConfigError, match=r"^data\.path=.*rows\.jsonl, row 3: the method needs a completion"):
        rows_of(data.train)


def test_a_stream_of_which_nothing_is_kept_is_refused(stream):
    data = stream(questions(1, 2), "data.max_prompt_length=2")
    from opd.errors import ConfigError

    with pytest.raises(ConfigError, match="none of 2 rows is kept"):
        data.train[0]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("train.max_steps=null",), ["train.max_steps=None", "streaming"]),
        (("train.save_every_epoch=true",), ["train.save_every_epoch=true", "no passes"]),
        (("mode=responses",), ["data.streaming=true", "mode=responses"]),
        (("method=dpo", "method.precompute_reference=true"), ["data.streaming=true", "method=dpo"]),
        (("data.path={json}",), ["data.streaming=true", ".json", ".jsonl"]),
    ],
)
def test_what_cannot_be_done_with_a_stream_is_refused(tmp_path, words, parts):
    rows = write_lines(tmp_path / "rows.jsonl", questions(1, 2))
    (tmp_path / "rows.json").write_text(json.dumps(questions(1, 2)))
    words = [word.replace("{json}", str(tmp_path / "rows.json")) for word in words]
    refused(*SFT, "data=file", f"data.path={rows}", "train.max_steps=2", *words, parts=parts)


def test_a_bad_row_of_a_stream_is_left_out_where_that_is_asked_for(stream):
    rows = [*questions(0, 1), {"prompt": " ", "completion": "x", "n": 9}, *questions(2)]
    found = numbers(stream(rows, "data.bad_rows=drop", steps=3).train)
    assert Counter(found) == {0: 4, 1: 4, 2: 4}
