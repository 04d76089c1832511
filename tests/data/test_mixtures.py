"""Sources in fixed shares: the largest mixture without a repeated row."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from own_rows import SAMPLES, loaded, questions, refused, rows_of, write_lines
from small_tokenizers import chatml, stop_ids

from opd.config import MixedOrigin
from opd.data.mixture import mix
from opd.data.rendering import Rendering
from opd.protocols import Needs

SFT = ("method=sft", "model/teacher=none", "data.eval_prompts=0", "data=mixture")


def source(name, path, weight, *words):
    return (f"+data.sources.{name}.path={path}", f"+data.sources.{name}.weight={weight}", *words)


def shares(data):
    return Counter(row.fields["source"] for row in rows_of(data.train))


@pytest.fixture
def files(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", questions(*range(12)))
    b = write_lines(tmp_path / "b.jsonl", questions(*range(100, 140)))
    return a, b


def test_weights_hold_and_the_scarce_source_is_used_up(files):
    data = loaded(*SFT, *source("a", files[0], 3), *source("b", files[1], 1))
    assert shares(data) == {"a": 12, "b": 4}  # M = 12 / (3/4) = 16, and 16 / 4
    told = data.summary["sources"]
    assert (told["a"]["used"], told["a"]["left_out"], told["b"]["used"], told["b"]["left_out"]) == (12, 0, 4, 36)
    counts = data.counts()
    assert counts["data/kept"] == 16 and counts["data/sources_b_left_out"] == 36


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(3, 30), st.sampled_from([0.1, 0.5, 1, 2.5, 3])), min_size=1, max_size=3))
def test_a_mixture_is_the_largest_whose_shares_hold(tmp_path_factory, parts):
    folder, sources = tmp_path_factory.mktemp("parts"), {}
    for n, (rows, weight) in enumerate(parts):
        path = write_lines(folder / f"{n}.jsonl", questions(*range(1000 * n, 1000 * n + rows)))
        sources[f"s{n}"] = MixedOrigin(path=str(path), weight=weight)
    total = sum(Fraction(str(weight)) for _, weight in parts)
    portions = [Fraction(str(weight)) / total for _, weight in parts]
    size = min(rows / portion for (rows, _), portion in zip(parts, portions, strict=True))
    wanted = [int(portion * size) for portion in portions]
    if 0 in wanted:
        return
    rendering = Rendering(chatml(), Needs(turns="all"), stop_ids(chatml()), None, None)
    mixed = rows_of(mix(sources, rendering, limit=None, seed=0))
    found = Counter(row.fields["source"] for row in mixed)
    assert [found[f"s{n}"] for n in range(len(parts))] == wanted
    assert len({row.fields["n"] for row in mixed}) == len(mixed) == sum(wanted)
    assert any(count == rows for count, (rows, _) in zip(wanted, parts, strict=True))


def test_the_seed_alone_decides_about_rows_and_order(files):
    words = (*SFT, *source("a", files[0], 1), *source("b", files[1], 1))
    turned = (*SFT, *source("b", files[1], 1), *source("a", files[0], 1))

    def order(*words):
        return [(row.fields["source"], row.fields["source_row"]) for row in rows_of(loaded(*words).train)]

    first = order(*words)
    assert first == order(*words) == order(*turned)
    assert first != order(*words, "run.seed=1")
    assert len({name for name, _ in first[:8]}) == 2  # in one order, not source after source


def test_rows_are_numbered_in_the_mixture_and_know_where_they_come_from(files):
    rows = rows_of(loaded(*SFT, *source("a", files[0], 1), *source("b", files[1], 1)).train)
    assert [row.row for row in rows] == list(range(1, 25))
    assert all(row.fields["n"] == row.fields["source_row"] - 1 for row in rows if row.fields["source"] == "a")


def test_a_limit_is_of_the_mixture_and_reads_no_source_further_than_it_needs(files, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(files[0].read_text() + "{\n")
    data = loaded(*SFT, *source("a", broken, 1), *source("b", files[1], 3), "data.limit=8")
    assert shares(data) == {"a": 2, "b": 6}
    refused(*SFT, *source("a", broken, 1), *source("b", files[1], 3), parts=["data.sources.a.path=", "line 13"])


def test_rows_that_are_dropped_do_not_count_for_the_share(files, tmp_path):
    long = [{"prompt": "long " * 40, "completion": "x", "n": -1}]
    some = write_lines(tmp_path / "some.jsonl", [*long, *questions(1, 2), *long])
    words = (*source("a", some, 1), *source("b", files[1], 1), "data.max_prompt_length=30")
    data = loaded(*SFT, *words)
    assert shares(data) == {"a": 2, "b": 2}
    assert data.summary["dropped"] == {"prompt_too_long": 2}
    assert data.summary["sources"]["a"]["dropped"] == {"prompt_too_long": 2}


def test_files_folders_and_columns_of_other_names_mix(files):
    columns = "+data.sources.math.columns={prompt:question,completion:final_answer}"
    math = source("math", SAMPLES / "deepmath", 1, columns)
    data = loaded(*SFT, *source("a", files[0], 1), *math)
    assert shares(data) == {"a": 5, "math": 5}
    talk = source("talk", SAMPLES / "deita_10k", 1, "+data.sources.talk.split=train_sft")
    assert shares(loaded(*SFT, *source("a", files[0], 1), *talk)) == {"a": 4, "talk": 4}


def test_a_mixture_written_in_one_word_or_in_a_config_of_ones_own(files, tmp_path):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from opd.__main__ import CONF

    words = (*SFT, f"+data.sources={{a:{{path:{files[0]},weight:2}},b:{{path:{files[1]},weight:1}}}}")
    assert shares(loaded(*words)) == {"a": 12, "b": 6}
    (tmp_path / "data").mkdir()
    mine = f"# mine\ndefaults: [mixture, _self_]\nsources: {{a: {{path: {files[0]}, weight: 2}}}}\n"
    (tmp_path / "data" / "mine.yaml").write_text(mine)
    path = [f"hydra.searchpath=[file://{tmp_path}]", "data=mine"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        data = OmegaConf.to_container(compose("config", overrides=path).data, resolve=True)
    assert data["name"] == "mixture" and data["sources"] == {"a": {"path": str(files[0]), "weight": 2}}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ["data.sources={}", "a mixture of nothing"]),
        (source("a", "{a}", 0), ["data.sources.a.weight=0", "greater than 0"]),
        (("+data.sources.a.path={a}",), ["data.sources.a.weight: missing"]),
        (("+data.sources.a.weight=1",), ["data.sources.a.path=None"]),
        (source("a", "{a}", 1, "+data.sources.a.pth=x"), ["data.sources.a.pth='x'", "did you mean path"]),
        (source("a", "./nowhere.jsonl", 1), ["data.sources.a.path=./nowhere.jsonl", "no such file"]),
        ((*source("a", "{a}", 1), *source("b", "{b}", 10000)), ["data.sources.a.weight=1", "less than one"]),
        ((*source("a", "{a}", 1), "data.streaming=true", "train.max_steps=1"), ["data.streaming=true", "mixture"]),
        ((*source("a", "{a}", 1), "data.eval_split=test"), ["data.eval_split=test", "no splits"]),
    ],
)
def test_a_bad_mixture_is_refused_in_one_line(files, words, parts):
    from opd.errors import ConfigError

    words = [word.replace("{a}", str(files[0])).replace("{b}", str(files[1])) for word in words]
    with pytest.raises(ConfigError) as caught:
        loaded(*SFT, *words)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_evaluation_rows_are_held_out_of_the_mixture_and_no_prompt_stands_on_both_sides(files):
    words = (*source("a", files[0], 1), *source("again", files[0], 1), "data.eval_prompts=6")
    data = loaded(*SFT[:2], "data=mixture", *words)
    evaluated = {tuple(row.prompt_ids) for row in data.evaluation}
    assert len(data.evaluation) == 6
    assert not evaluated & {tuple(row.prompt_ids) for row in rows_of(data.train)}
