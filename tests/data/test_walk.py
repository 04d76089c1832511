from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from itertools import pairwise

import pytest
from contract.variants import compose

from opd.conditions import validated
from opd.data import load_data
from opd.data.walk import WalkEval, WalkPrompts, WalkTask, recovery_prompts
from opd.data.walk_corpus import WalkCorpus
from opd.data.walk_preferences import bold_path, bold_share, boldest, longer_path, most_timid, timid_path
from opd.data.walk_rules import (
    NUMBERS,
    detour_trace,
    distances,
    evaluation_pairs,
    legal_moves,
    optimal_moves,
    optimal_path,
    render_path,
    render_prompt,
    score,
    training_pairs,
)
from opd.data.walk_tokenizer import build_tokenizer
from opd.errors import ConfigError
from opd.protocols import Needs, Privileged

HINTED = Privileged("{user}\n\n{privileged}", None, "messages", "template", "error", None)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# The rules


def test_legal_moves_stay_in_range_and_never_stand_still():
    assert legal_moves(25) == (15, 24, 26, 50)
    assert legal_moves(10) == (11, 20)
    assert legal_moves(99) == (89, 98)
    assert all(move in NUMBERS and move != state for state in NUMBERS for move in legal_moves(state))


def test_distances_satisfy_the_shortest_path_equation():
    for goal in NUMBERS:
        distance = distances(goal)
        assert distance[goal] == 0
        for state in set(NUMBERS) - {goal}:
            assert distance[state] == 1 + min(distance[move] for move in legal_moves(state))


def test_there_are_7453_pairs_of_which_512_are_held_out():
    evaluation, training = evaluation_pairs(), training_pairs()
    assert (len(evaluation), len(training)) == (512, 6941)
    assert len({*evaluation, *training}) == 7453
    assert {*evaluation, *training} == {
        (start, goal) for start in NUMBERS for goal in NUMBERS if 2 <= distances(goal)[start] <= 9
    }


def test_no_start_and_goal_is_in_both_splits():
    assert not set(evaluation_pairs()) & set(training_pairs())


def test_the_mean_optimal_length_is_about_4_7():
    lengths = [distances(goal)[start] for start, goal in (*evaluation_pairs(), *training_pairs())]
    assert sum(lengths) / len(lengths) == pytest.approx(4.75, abs=0.1)


def test_a_shortest_walk_is_legal_and_as_long_as_the_distance():
    rng = random.Random(3)
    for start, goal in training_pairs()[:1000]:
        path = optimal_path(start, goal, rng)
        assert len(path) == distances(goal)[start]
        assert path[-1] == goal
        assert all(move in legal_moves(state) for state, move in pairwise([start, *path]))


def test_every_optimal_first_move_is_equally_likely():
    start, goal = next((s, g) for s, g in training_pairs() if len(optimal_moves(g)[s]) == 3)
    rng = random.Random(0)
    draws = [optimal_path(start, goal, rng)[0] for _ in range(6000)]
    for move in optimal_moves(goal)[start]:
        assert draws.count(move) == pytest.approx(2000, abs=150)  # 4 standard deviations


class Script:
    """A source of randomness that says what it is told."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def test_detours_are_marked_and_the_moves_after_them_are_not():
    # a detour (coin .1 < .15) to the largest legal move, then coins of .9 and first options all the way home
    path, is_detour = detour_trace(25, 22, Script(0.1, 0.99, *[0.9, 0.0] * 9), 0.15)
    assert path[0] == 50
    assert is_detour == [True] + [False] * (len(path) - 1)
    assert len(path) == 1 + distances(22)[50]
    assert path[-1] == 22


def test_a_detour_trace_deviates_from_optimal_moves_only_where_it_is_marked():
    rng = random.Random(1)
    for start, goal in training_pairs()[:1000]:
        path, is_detour = detour_trace(start, goal, rng, 0.3)
        for state, move, detour in zip([start, *path], path, is_detour, strict=False):
            assert move in (legal_moves(state) if detour else optimal_moves(goal)[state])


def test_a_trace_of_nothing_but_detours_is_cut_at_16_or_ends_at_the_goal():
    rng = random.Random(2)
    traces = [(goal, detour_trace(start, goal, rng, 1.0)[0]) for start, goal in training_pairs()[:200]]
    assert {len(path) for goal, path in traces if path[-1] != goal} == {16}
    assert all(goal not in path[:-1] and len(path) <= 16 for goal, path in traces)


# The score


@pytest.mark.parametrize(
    ("text", "finished", "success", "optimal"),
    [
        ("24 23 22", True, 1, 1),
        ("26 16 32 22", True, 1, 0),
        ("24 23 22", False, 0, 0),
        ("24 23", True, 0, 0),
        ("23 22", True, 0, 0),  # 25 -> 23 is no move
        (" 24 23 22", True, 0, 0),
        ("24  23 22", True, 0, 0),
        ("24 23 22 ", True, 0, 0),
        ("24 23 22\n", True, 0, 0),
        ("+24 23 22", True, 0, 0),
        ("24 ２3 22", True, 0, 0),
        ("", True, 0, 0),
        ("24 25 24 25 24 25 24 25 24 24 23 22", True, 0, 0),  # a number is no move to itself
        ("26 25 24 25 26 25 26 25 24 23 22", True, 1, 0),
        ("24 25 24 25 24 25 24 25 24 25 24 23 22", True, 0, 0),  # 13 numbers
    ],
)
def test_an_answer_scores_by_the_rules(text, finished, success, optimal):
    assert score(25, 22, text, finished) == {"success": success, "optimal": optimal}


def test_twelve_numbers_are_allowed():
    text = "24 25 24 25 24 25 24 25 15 14 13 12"
    assert len(text.split()) == 12
    assert score(25, 12, text, True)["success"] == 1


def test_forced_numbers_count_towards_the_twelve_and_text_is_joined_as_it_comes():
    assert score(25, 22, " 24 23 22", True, prefix="26 25") == {"success": 1, "optimal": 1}
    assert score(25, 22, " 26 25 24 23 22", True, prefix="26 25") == {"success": 1, "optimal": 0}
    assert score(25, 22, "24 23 22", True, prefix="26 25")["success"] == 0
    assert score(25, 22, "", True, prefix="24 23")["success"] == 0
    eleven = " 24 25 24 25 24 25 24 25 24 23 22"
    assert score(25, 22, eleven, True)["success"] == 0  # the leading space
    assert score(25, 22, eleven[1:], True)["success"] == 1
    assert score(25, 22, eleven, True, prefix="26 25")["success"] == 0


# The tokenizer


def test_the_vocabulary_has_468_entries_and_every_number_is_one_token(tokenizer):
    assert len(tokenizer) == 468
    assert all(len(encode(tokenizer, f"{space}{n}")) == 1 for n in NUMBERS for space in ("", " "))


def test_the_special_tokens_come_first_and_the_end_is_not_padding(tokenizer):
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.bos_token is None and tokenizer.unk_token is None
    assert tokenizer.decode(encode(tokenizer, "".join(specials) + "25"), skip_special_tokens=True) == "25"


def test_a_smaller_vocabulary_leaves_38_numbers_in_pieces_at_the_beginning_of_a_text_only():
    small = build_tokenizer(430)
    assert len(small) == 430
    assert sorted(len(encode(small, str(number))) for number in NUMBERS) == [1] * 52 + [2] * 38
    assert all(len(encode(small, f" {number}")) == 1 for number in NUMBERS)


def test_a_smaller_vocabulary_reads_and_writes_every_prompt_and_answer():
    small = build_tokenizer(430)
    for example in (*WalkPrompts(small, 512), *WalkEval(small)):
        prompt, completion = example.fields["prompt"], example.fields["completion"]
        assert small.decode(example.prompt_ids) == f"<|user|>{prompt}<|end|><|assistant|>"
        assert small.decode(example.completion_ids) == f"{completion}<|end|>"
        assert len(example.completion_ids) <= len(completion.split(" ")) + 2


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match="vocab_size of the walk tokenizer must be at least 261, got 260"):
        build_tokenizer(260)


def test_a_rendered_row_has_six_tokens_before_the_answer(tokenizer):
    conversation = [{"role": "user", "content": "25 to 22"}, {"role": "assistant", "content": "26 16 32 22"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == "<|user|>25 to 22<|end|><|assistant|>26 16 32 22<|end|>"
    assert len(encode(tokenizer, text)) == 6 + 4 + 1


@pytest.mark.parametrize(
    "text",
    ["26 16 32 22", " 26", "  two  spaces ", "Grüße, 世界", "👩‍👩‍👧 e\u0301\x00\t\r\n", "1234567890 ." * 20],
)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_the_tokenizer_has_the_same_bytes_in_every_process(tokenizer):
    code = (
        "import hashlib; from opd.data.walk_tokenizer import build_tokenizer as b;"
        "print(hashlib.sha256(b().backend_tokenizer.to_str().encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest() == other


def test_saving_and_loading_keeps_template_and_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 1, "left")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = "<|user|>25 to 22<|end|><|assistant|>26 16 Grüße 👍<|end|>"
    assert encode(loaded, text) == encode(tokenizer, text)
    assert loaded.decode(encode(loaded, " 26 ,")) == " 26 ,"


# The rows


def test_training_rows_are_prompts_and_one_shortest_walk_with_its_end_token(tokenizer):
    rows = WalkPrompts(tokenizer, num_prompts=40, seed=0)
    assert len(rows) == 40
    for row, (start, goal) in enumerate(training_pairs()[:40]):
        example = rows[row]
        assert example.row == row
        assert tokenizer.decode(example.prompt_ids) == f"<|user|>{start} to {goal}<|end|><|assistant|>"
        assert tokenizer.decode(example.completion_ids) == example.fields["completion"] + "<|end|>"
        assert example.fields["prompt"] == render_prompt(start, goal)
        assert example.completion_mask is None
        assert score(start, goal, example.fields["completion"], True) == {"success": 1, "optimal": 1}


def test_more_prompts_extend_the_training_set(tokenizer):
    small, large = WalkPrompts(tokenizer, num_prompts=5), WalkPrompts(tokenizer, num_prompts=9)
    assert list(small) == [large[row] for row in range(5)]


def test_a_tokenizer_without_an_end_token_is_refused():
    endless = build_tokenizer()
    endless.eos_token = None
    for rows in (WalkPrompts, WalkCorpus):
        with pytest.raises(ConfigError, match="set its eos_token"):
            rows(endless, 1)


def test_the_seed_changes_references_and_not_prompts(tokenizer):
    first, second = WalkPrompts(tokenizer, 64, seed=0), WalkPrompts(tokenizer, 64, seed=1)
    assert [e.prompt_ids for e in first] == [e.prompt_ids for e in second]
    assert [e.completion_ids for e in first] != [e.completion_ids for e in second]


def test_evaluation_rows_are_the_held_out_pairs(tokenizer):
    rows = WalkEval(tokenizer)
    assert [(e.fields["start"], e.fields["goal"]) for e in rows] == list(evaluation_pairs())
    assert all(WalkTask().score(e, e.fields["completion"], True)["optimal"] == 1 for e in rows)


@pytest.mark.parametrize("num_prompts", [0, 6942])
def test_a_number_of_training_prompts_out_of_range_is_refused(tokenizer, num_prompts):
    with pytest.raises(ConfigError, match=rf"data.limit must lie in 1..6941, got {num_prompts}"):
        WalkPrompts(tokenizer, num_prompts)


def test_a_number_of_evaluation_prompts_out_of_range_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"data.eval_prompts must lie in 1..512, got 513"):
        WalkEval(tokenizer, 513)


# The variants


@pytest.mark.parametrize("variant", ["plain", "bold", "short", "hint"])
def test_no_evaluation_prompt_is_trained_on_in_any_variant(tokenizer, variant):
    task = WalkTask(variant)
    held_out = {(e.fields["start"], e.fields["goal"]) for e in task.evaluation(tokenizer)}
    assert held_out == set(evaluation_pairs())
    assert not held_out & {(e.fields["start"], e.fields["goal"]) for e in task.train(tokenizer, 1500)}


@pytest.mark.parametrize("variant", ["plain", "bold", "short", "hint"])
def test_every_variant_asks_the_student_the_same(tokenizer, variant):
    plain = {e.row: e.prompt_ids for e in WalkPrompts(tokenizer, 256)}
    assert all(e.prompt_ids == plain[e.row] for e in WalkPrompts(tokenizer, 256, variant=variant))


def test_the_boldest_move_jumps_furthest_and_the_larger_number_breaks_a_tie():
    assert boldest(25, legal_moves(25)) == 50
    assert most_timid(25, legal_moves(25)) == 26  # 24 is as near
    assert boldest(25, (24, 26)) == 26
    assert boldest(25, (15, 26)) == 15


def test_665_of_the_first_1024_training_prompts_have_a_bold_and_another_timid_walk(tokenizer):
    rows = WalkPrompts(tokenizer, 1024, variant="bold")
    assert len(rows) == 665
    wanted = [row for row, pair in enumerate(training_pairs()[:1024]) if bold_path(*pair) != timid_path(*pair)]
    assert [example.row for example in rows] == wanted


def test_a_bold_pair_is_two_shortest_walks_of_equal_length(tokenizer):
    for example in WalkPrompts(tokenizer, 1500, variant="bold"):
        start, goal = example.fields["start"], example.fields["goal"]
        chosen, rejected = example.fields["chosen"], example.fields["rejected"]
        assert score(start, goal, chosen, True) == score(start, goal, rejected, True) == {"success": 1, "optimal": 1}
        assert chosen != rejected
        assert tokenizer.decode(example.completion_ids) == f"{chosen}<|end|>"
        assert tokenizer.decode(example.alternatives["rejected"]) == f"{rejected}<|end|>"
        assert len(example.completion_ids) == len(example.alternatives["rejected"])
        assert bold_share(start, goal, chosen) == 1 > bold_share(start, goal, rejected)


def test_no_walk_chosen_for_its_boldness_could_jump_further_at_once():
    for start, goal in training_pairs()[:500]:
        jumps = [abs(move - start) for move in optimal_moves(goal)[start]]
        assert abs(bold_path(start, goal)[0] - start) == max(jumps)
        assert abs(timid_path(start, goal)[0] - start) == min(jumps)


def test_a_short_pair_is_the_reference_and_a_longer_walk_that_succeeds(tokenizer):
    plain = WalkPrompts(tokenizer, 300, seed=2)
    rows = WalkPrompts(tokenizer, 300, seed=2, variant="short")
    assert len(rows) == 300
    for reference, example in zip(plain, rows, strict=True):
        start, goal, rejected = (example.fields[name] for name in ("start", "goal", "rejected"))
        assert example.completion_ids == reference.completion_ids
        assert score(start, goal, rejected, True) == {"success": 1, "optimal": 0}
        assert tokenizer.decode(example.alternatives["rejected"]) == f"{rejected}<|end|>"
        assert len(example.alternatives["rejected"]) > len(example.completion_ids)


def test_every_prompt_has_a_longer_walk_of_at_most_twelve_numbers():
    rng = random.Random(0)
    for start, goal in training_pairs():
        assert distances(goal)[start] < len(longer_path(start, goal, rng)) <= 12


def test_more_prompts_extend_the_pairs(tokenizer):
    for variant in ("bold", "short"):
        few, many = (list(WalkPrompts(tokenizer, number, variant=variant)) for number in (40, 90))
        assert few == many[: len(few)]


# From 70 to 41, three moves of -10 and one of +1 in any order but for the last two: a choice at 70, 60 and 50, none at 71,
# 61, 51 and 40. At 69, where one is off the shortest walks, 59 and 70 are optimal.
@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("60 50 40 41", 1),
        ("71 61 51 41", 0),
        ("60 61 51 41", 1 / 2),
        ("60 50 51 41", 2 / 3),
        ("69 70 60 50 40 41", 3 / 4),  # 69 is not optimal and does not count, 70 from there does
        ("60 61 60 50 40 41", 3 / 4),  # nor does going back
        ("60 50 52 42 41", 1),  # read up to the illegal move
        ("60 5", 1),
        ("71 61 51 41 42 52", 0),  # read up to the goal
        ("69", None),
        ("50 40 41", None),
        ("", None),
    ],
)
def test_the_bold_share_counts_optimal_moves_where_there_was_a_choice(text, share):
    assert {state: optimal_moves(41)[state] for state in (70, 60, 50, 71, 61, 51, 40, 69)} == {
        70: (60, 71), 60: (50, 61), 50: (40, 51), 71: (61,), 61: (51,), 51: (41,), 40: (41,), 69: (59, 70)
    }  # fmt: skip
    assert bold_share(70, 41, text) == (None if share is None else pytest.approx(share))


def test_boldness_is_scored_in_its_variant_and_only_where_an_answer_has_any(tokenizer):
    task, plain = WalkTask("bold"), WalkTask()
    for example in task.evaluation(tokenizer, 64):
        found = task.score(example, example.fields["completion"], True)
        assert found == {"success": 1, "optimal": 1, "bold": 1} or found == {"success": 1, "optimal": 1}
        assert ("bold" in found) == any(
            len(optimal_moves(example.fields["goal"])[state]) > 1
            for state in [example.fields["start"], *map(int, example.fields["completion"].split(" "))]
        )
        assert "bold" not in plain.score(example, example.fields["completion"], True)
        assert task.score(example, "", True) == {"success": 0, "optimal": 0}
    for probe in task.probes(tokenizer, 8)["recovery"]:
        assert task.score(probe, "", True) == {"success": 0, "optimal": 0}


def test_an_evaluation_row_has_an_alternative_where_its_bold_walk_is_not_the_timid_one(tokenizer):
    for example in WalkEval(tokenizer, variant="bold"):
        pair = (example.fields["start"], example.fields["goal"])
        assert ("rejected" in example.alternatives) == (bold_path(*pair) != timid_path(*pair))


def test_the_teacher_reads_the_rows_own_answer_as_a_hint_and_the_student_does_not(tokenizer):
    for rows in (WalkPrompts(tokenizer, 64, seed=1, variant="hint"), WalkEval(tokenizer, 64, variant="hint")):
        for example in rows:
            start, goal, answer = (example.fields[name] for name in ("start", "goal", "completion"))
            plain, hinted = tokenizer.decode(example.prompt_ids), tokenizer.decode(example.teacher_prompts["teacher"])
            assert plain == f"<|user|>{start} to {goal}<|end|><|assistant|>"
            assert hinted == f"<|user|>{start} to {goal}\nhint: {answer}<|end|><|assistant|>"
            assert tokenizer.decode(example.completion_ids) == f"{answer}<|end|>"


def test_the_hinted_probe_shows_a_solution_of_the_evaluation_prompts(tokenizer):
    probe = WalkTask("hint").probes(tokenizer, 32)["hinted"]
    for example, (start, goal) in zip(probe, evaluation_pairs()[:32], strict=True):
        prompt = tokenizer.decode(example.prompt_ids)
        hint = prompt.partition("hint: ")[2].partition("<|end|>")[0]
        assert prompt.startswith(f"<|user|>{start} to {goal}\nhint: ")
        assert WalkTask("hint").score(example, hint, True) == {"success": 1, "optimal": 1}
    assert set(WalkTask().probes(tokenizer, 1)) == {"recovery"}


def test_a_teacher_with_another_tokenizer_reads_the_prompt_in_its_own_ids(tokenizer):
    small = build_tokenizer(430)
    rows = WalkPrompts(small, 64, teacher_tokenizer=tokenizer)
    own = WalkPrompts(tokenizer, 64)
    assert [e.teacher_prompts for e in rows] == [{"teacher": e.prompt_ids} for e in own]
    assert [e.prompt_ids for e in rows] == [e.prompt_ids for e in WalkPrompts(small, 64)]
    assert all(e.teacher_prompts == {} for e in own)


@pytest.mark.parametrize(
    ("data", "needs", "refusal"),
    [
        (
            "walk",
            Needs(sequences=("chosen", "rejected")),
            r"^data.variant=plain: .* preference pairs; use data=walk_bold$",
        ),
        ("walk_hint", Needs(sequences=("chosen", "rejected")), r"^data.variant=hint: .* preference pairs; use"),
        ("walk", Needs(privileged=HINTED), r"^data.variant=plain: .* a hint for its teacher; use data=walk_hint$"),
        ("walk_bold", Needs(privileged=HINTED), r"^data.variant=bold: .* a hint for its teacher; use"),
    ],
)
def test_a_method_that_needs_more_than_the_variant_has_is_refused(tokenizer, data, needs, refusal):
    with pytest.raises(ConfigError, match=refusal):
        load_data(validated(compose("method=sft", f"data={data}")), tokenizer, needs, frozenset({1}))


def test_pairs_that_are_dropped_are_counted(tokenizer):
    config = validated(compose("method=sft", "data=walk_bold", "data.eval_prompts=4"))
    data = load_data(config, tokenizer, Needs(sequences=("chosen", "rejected")), frozenset({1}))
    assert data.summary == {"rows": 1024, "kept": 665, "dropped": {"chosen_is_rejected": 359}}
    assert (len(data.train), len(data.evaluation)) == (665, 4)


@pytest.mark.parametrize(("data", "probes"), [("walk_short", {"recovery"}), ("walk_hint", {"recovery", "hinted"})])
def test_a_variant_is_chosen_by_the_name_of_its_yaml(tokenizer, data, probes):
    config = validated(compose("method=sft", f"data={data}", "data.limit=64", "data.eval_prompts=4"))
    loaded = load_data(config, tokenizer, Needs(), frozenset({1}))
    assert set(loaded.probes) == probes
    assert list(loaded.train) == list(WalkPrompts(tokenizer, 64, variant=data.removeprefix("walk_")))


# The corpus


@pytest.mark.parametrize("vocab_size", [512, 430])
def test_corpus_ids_are_those_of_the_whole_text(vocab_size):
    tokenizer = build_tokenizer(vocab_size)
    corpus = WalkCorpus(tokenizer, 2000, seed=5, detour_probability=0.15)
    for example in corpus:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.fields["prompt"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert example.prompt_ids == encode(tokenizer, text)
        reached = example.fields["completion"].endswith(str(example.fields["goal"]))
        end = "<|end|>" if reached else ""
        assert example.completion_ids == encode(tokenizer, example.fields["completion"] + end)


@pytest.mark.parametrize("vocab_size", [512, 430])
def test_the_mask_is_false_on_exactly_the_tokens_of_detours(vocab_size):
    from opd.randomness import generator

    tokenizer = build_tokenizer(vocab_size)
    corpus = WalkCorpus(tokenizer, 1000, seed=2, detour_probability=0.15)
    masked = total = 0
    for row, example in enumerate(corpus):
        start, goal = example.fields["start"], example.fields["goal"]
        path, is_detour = detour_trace(start, goal, generator(2, "walk_corpus", row), 0.15)
        assert render_path(path) == example.fields["completion"]
        expected = []
        for position, (number, detour) in enumerate(zip(path, is_detour, strict=True)):
            expected += [not detour] * len(encode(tokenizer, f"{' ' * (position > 0)}{number}"))
        assert example.completion_mask == expected + [True] * (path[-1] == goal)
        masked, total = masked + sum(is_detour), total + len(path)
    assert masked / total == pytest.approx(0.15, abs=0.02)


def test_a_trace_that_was_cut_has_no_end_token(tokenizer):
    corpus = WalkCorpus(tokenizer, 300, detour_probability=1.0)
    for example in corpus:
        reached = example.fields["completion"].split(" ")[-1] == str(example.fields["goal"])
        assert (example.completion_ids[-1] == tokenizer.eos_token_id) == reached
        assert reached or len(example.completion_ids) == 16
    assert sum(example.completion_ids[-1] == tokenizer.eos_token_id for example in corpus) not in (0, 300)


def test_a_corpus_without_detours_holds_shortest_walks_and_no_mask(tokenizer):
    for example in WalkCorpus(tokenizer, 500):
        assert example.completion_mask is None
        assert WalkTask().score(example, example.fields["completion"], True)["optimal"] == 1


def test_corpus_rows_are_the_same_in_any_order_of_access(tokenizer):
    rows = [*range(0, 20000, 501)]
    forwards = WalkCorpus(tokenizer, 20000, seed=1, detour_probability=0.15)
    backwards = WalkCorpus(tokenizer, 20001, seed=1, detour_probability=0.15)
    assert [forwards[row] for row in rows] == [backwards[row] for row in reversed(rows)][::-1]


def test_each_pass_over_the_corpus_visits_every_training_pair_once(tokenizer):
    size = len(training_pairs())
    corpus = WalkCorpus(tokenizer, 2 * size)
    visited = [(example.fields["start"], example.fields["goal"]) for example in corpus]
    assert set(visited[:size]) == set(visited[size:]) == set(training_pairs())
    assert visited[:size] != visited[size:]


def test_a_pair_gets_a_fresh_walk_in_every_pass(tokenizer):
    size = len(training_pairs())
    passes = WalkCorpus(tokenizer, 2 * size)
    walks = [{e.fields["prompt"]: e.fields["completion"] for e in map(passes.__getitem__, r)} for r in
             (range(size), range(size, 2 * size))]  # fmt: skip
    assert sum(walks[0][prompt] != walks[1][prompt] for prompt in walks[0]) > size / 4


@pytest.mark.parametrize("vocab_size", [512, 430])
def test_hinted_corpus_prompts_are_those_of_the_whole_text_and_show_a_shortest_walk(vocab_size):
    tokenizer = build_tokenizer(vocab_size)
    corpus = WalkCorpus(tokenizer, 2000, seed=5, detour_probability=0.15, hint_probability=0.93)
    hinted = followed = 0
    for example in corpus:
        start, goal, prompt = (example.fields[name] for name in ("start", "goal", "prompt"))
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert example.prompt_ids == encode(tokenizer, text)
        question, _, hint = prompt.partition("\nhint: ")
        assert question == f"{start} to {goal}"
        if hint:
            assert score(start, goal, hint, True) == {"success": 1, "optimal": 1}
            hinted += 1
            followed += example.fields["completion"] == hint
    assert hinted / 2000 == pytest.approx(0.93, abs=0.02)
    assert followed / hinted > 0.5  # a walk drawn on its own can be the hint too


def test_a_row_that_follows_its_hint_has_no_detour_and_the_others_are_the_corpus_without_hints(tokenizer):
    plain = WalkCorpus(tokenizer, 1000, seed=1, detour_probability=0.15)
    hinted = WalkCorpus(tokenizer, 1000, seed=1, detour_probability=0.15, hint_probability=1.0)
    differing = [row for row in range(1000) if hinted[row].completion_ids != plain[row].completion_ids]
    assert 250 < len(differing) < 550
    for row in differing:
        example = hinted[row]
        assert example.fields["prompt"].endswith(f"hint: {example.fields['completion']}")
        assert all(example.completion_mask)


def test_a_row_outside_the_corpus_is_an_index_error(tokenizer):
    corpus = WalkCorpus(tokenizer, 3)
    assert len(list(corpus)) == len(corpus) == 3
    for row in (-1, 3):
        with pytest.raises(IndexError):
            corpus[row]


def test_impossible_corpora_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        WalkCorpus(tokenizer, 0)
    with pytest.raises(ConfigError, match=r"detour_probability must lie in \[0, 1\], got 1.5"):
        WalkCorpus(tokenizer, 1, detour_probability=1.5)
    with pytest.raises(ConfigError, match=r"hint_probability must lie in \[0, 1\], got -0.1"):
        WalkCorpus(tokenizer, 1, hint_probability=-0.1)


def test_a_tokenizer_that_joins_numbers_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    joins = Tokenizer(models.BPE())
    joins.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(special_tokens=["<|end|>"], show_progress=False)
    joins.train_from_iterator(["10 10 11 12 13"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joins, eos_token="<|end|>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="encodes numbers one by one"):
        WalkCorpus(tokenizer, 1)


# The recovery probe


def test_recovery_forces_two_legal_moves_that_are_not_the_goal(tokenizer):
    for example, plain in zip(recovery_prompts(tokenizer), WalkEval(tokenizer), strict=True):
        start, goal = example.fields["start"], example.fields["goal"]
        forced = [int(piece) for piece in example.fields["prefix"].split(" ")]
        assert len(forced) == 2 and goal not in forced
        assert all(move in legal_moves(state) for state, move in pairwise([start, *forced]))
        assert example.prompt_ids == plain.prompt_ids + encode(tokenizer, example.fields["prefix"])
        assert example.completion_ids is None


def test_every_recovery_prompt_can_be_solved(tokenizer):
    rng, task = random.Random(0), WalkTask()
    for seed in range(3):
        for example in recovery_prompts(tokenizer, seed=seed):
            last = int(example.fields["prefix"].split(" ")[-1])
            text = "".join(f" {number}" for number in optimal_path(last, example.fields["goal"], rng))
            assert task.score(example, text, True) == {"success": 1, "optimal": 1}


def test_a_generated_answer_survives_decoding_to_its_score(tokenizer):
    example = recovery_prompts(tokenizer, 1)[0]
    last = int(example.fields["prefix"].split(" ")[-1])
    text = "".join(f" {n}" for n in optimal_path(last, example.fields["goal"], random.Random(0)))
    whole = tokenizer.decode(example.prompt_ids) + text
    generated = encode(tokenizer, whole)[len(example.prompt_ids) :]
    assert WalkTask().score(example, tokenizer.decode(generated), True)["success"] == 1


def test_a_smaller_probe_is_the_beginning_of_a_larger_one(tokenizer):
    assert recovery_prompts(tokenizer, 5) == recovery_prompts(tokenizer, 9)[:5]


def test_the_task_offers_what_a_run_asks_for(tokenizer):
    task = WalkTask()
    assert list(task.train(tokenizer, 3, 1)) == list(WalkPrompts(tokenizer, 3, 1))
    assert list(task.evaluation(tokenizer, 3)) == list(WalkEval(tokenizer, 3))
    assert task.probes(tokenizer, 3) == {"recovery": recovery_prompts(tokenizer, 3)}


def test_the_walk_needs_no_torch():
    code = "import sys, opd.data.walk; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
