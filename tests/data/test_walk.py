from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from itertools import pairwise

import pytest

from opd.data.walk import WalkCorpus, WalkEval, WalkPrompts, WalkTask, recovery_prompts
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


def test_a_smaller_vocabulary_leaves_numbers_in_pieces():
    small = build_tokenizer(430)
    assert len(small) == 430
    assert any(len(encode(small, str(number))) == 2 for number in NUMBERS)


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
