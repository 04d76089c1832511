"""A row that cannot be read stops the run, or is left out, counted, and told."""

from __future__ import annotations

import pytest
from small_tokenizers import chatml, stop_ids

from opd.data.readers import Row
from opd.data.rendering import Rendering
from opd.errors import ConfigError
from opd.protocols import Needs

PAIRS = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD = {
    "an empty prompt": ({"prompt": " ", "completion": "b"}, "the prompt is empty"),
    "a role of another vendor": ({"messages": [{"role": "human", "content": "a"}]}, "did you mean user?"),
    "half a character": ({"prompt": "\ud800", "completion": "b"}, "half a character"),
    "no content": ({"messages": [{"role": "user"}]}, "needs a string as its content"),
    "a pair that prefers nothing": ({**PAIRS, "rejected": "b"}, "chosen and rejected are the same"),
}


def rendered(rows, *, drops_bad, kinds=("single",)):
    needs = Needs(sequences=kinds, completions="optional")
    rendering = Rendering(chatml(), needs, stop_ids(chatml()), None, None, drops_bad=drops_bad)
    tally = rendering.tally()
    numbered = [Row(number, fields) for number, fields in enumerate(rows, start=1)]
    return [example.row for example in rendering.examples(numbered, {}, "data.path=x", tally)], tally, rendering


def kinds_of(fields):
    return ("chosen", "rejected") if "chosen" in fields else ("single",)


@pytest.mark.parametrize("fields, problem", BAD.values(), ids=BAD)
def test_a_bad_row_is_left_out_counted_and_told_where_that_is_asked_for(fields, problem):
    good = PAIRS if "chosen" in fields else {"prompt": "a", "completion": "b"}
    kept, tally, _ = rendered([good, fields, good], drops_bad=True, kinds=kinds_of(fields))
    assert kept == [1, 3]
    assert tally.summary()["dropped"] == {"bad": 1}
    assert "row 2" in tally.summary()["first_bad"] and problem in tally.summary()["first_bad"]


@pytest.mark.parametrize("fields, problem", BAD.values(), ids=BAD)
def test_a_bad_row_stops_the_run_by_default_and_the_way_past_it_is_named(fields, problem):
    with pytest.raises(ConfigError, match=r"data\.bad_rows=drop") as refusal:
        rendered([fields], drops_bad=False, kinds=kinds_of(fields))
    assert problem in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_data_in_which_no_row_can_be_read_is_refused_with_the_first_reason():
    kept, tally, rendering = rendered([{"question": "a"}] * 3, drops_bad=True)
    refusal = str(rendering.nothing_kept("data.path=x", tally))
    assert not kept
    assert "none of 3 rows can be read" in refusal and "data.columns.prompt=question" in refusal
