"""A student that DeepSpeed trains (ZeRO-1, 2, 3) learns what a single process teaches it; a teacher may lie in parts."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from contract.command import write_inputs
from contract.kills import assert_equal_to_the_bit, killed_and_whole
from contract.tiny import assert_same_numbers
from contract.variants import ALL_VARIANTS, DEFAULTS, VARIANTS, changed, needs_of, tiny_config

from opd.deepspeed_config import deepspeed_config
from opd.errors import ConfigError
from opd.hardware_conditions import hardware_problems

pytest.importorskip("deepspeed", reason="pip install 'opd[deepspeed]'")

from contract.processes import on_two_ranks

from sharding import zero

STAGES = ("zero1", "zero2", "zero3")
SAMPLING = next(variant for variant in DEFAULTS if needs_of(variant).rollouts)
WINDOWED = next(variant for variant in DEFAULTS if needs_of(variant).window)
FROM_DATA = next(variant for variant in DEFAULTS if not needs_of(variant).rollouts)


def averages(variant):
    return any(need.model == "ema" for need in needs_of(variant).teachers.values())


AVERAGING = next(variant for variant in VARIANTS if averages(variant))
INITIAL = next(v for v in VARIANTS if any(need.model == "initial" for need in needs_of(v).teachers.values()))

trained = functools.partial(functools.partial, zero.trained)
# Compared with a single process.
EQUAL = {
    **{f"zero3 {variant}": trained("zero3", variant) for variant in (SAMPLING, FROM_DATA, WINDOWED, INITIAL)},
    **{f"zero2 {variant}": trained("zero2", variant) for variant in (SAMPLING, FROM_DATA, AVERAGING)},
    f"zero1 {SAMPLING}": trained("zero1", SAMPLING),
    "zero3 tied head": trained("zero3", SAMPLING, student={"kind": "gemma2"}),
    "zero3 adapter": trained("zero3", WINDOWED, student={"dropout": 0.0}),
    "zero2 adapter": trained("zero2", SAMPLING, student={"dropout": 0.0}),
    "zero3 checkpointing": trained("zero3", SAMPLING, student={"checkpointing": True}),
}
MORE = {
    f"{stage} {variant}": trained(stage, variant)
    for stage in STAGES
    for variant in (ALL_VARIANTS if stage == "zero3" else DEFAULTS)
    if f"{stage} {variant}" not in EQUAL and not (stage == "zero3" and averages(variant))
}
RESUMED = {
    **{f"resumed {stage}": functools.partial(zero.resumed, stage, SAMPLING) for stage in STAGES},
    "resumed average": functools.partial(zero.resumed, "zero2", AVERAGING),
    "resumed adapter": functools.partial(zero.resumed, "zero3", SAMPLING, dropout=0.1),
}
EMPTY = {f"empty {stage}": functools.partial(zero.with_an_empty_step, stage, SAMPLING) for stage in STAGES}
HALF = {f"half {stage}": functools.partial(zero.in_half_precision, stage, FROM_DATA) for stage in STAGES}
FROZEN = {
    f"frozen {kind} {dtype}": functools.partial(zero.frozen, kind, dtype)
    for kind, dtype in (("llama", torch.float32), ("gemma2", torch.bfloat16))
}
ALONE = {
    "alone": functools.partial(zero.gathered_alone, SAMPLING),
    "base": functools.partial(zero.base_as_teacher, SAMPLING),
}


@pytest.fixture(scope="module")
def equal_ranks(tmp_path_factory):
    return on_two_ranks(EQUAL, tmp_path_factory.mktemp("equal"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks({**RESUMED, **EMPTY, **HALF, **FROZEN, **ALONE}, tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def more_ranks(tmp_path_factory):
    return on_two_ranks(MORE, tmp_path_factory.mktemp("more"))


@pytest.mark.parametrize("case", EQUAL)
def test_two_ranks_train_what_a_single_process_does(case, equal_ranks, tmp_path):
    assert_ranks_are_one(case, equal_ranks[case], EQUAL[case](1, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_two_ranks_train_every_variant_as_a_single_process_does(case, more_ranks, tmp_path):
    assert_ranks_are_one(case, more_ranks[case], MORE[case](1, tmp_path))


def assert_ranks_are_one(case, told, alone):
    for one, other, both in zip(told[0]["rollouts"], told[1]["rollouts"], alone["rollouts"], strict=True):
        assert one + other == both
    for rank in told:
        for mine, expected in zip(rank["named"], alone["named"], strict=True):
            assert_same_numbers(mine, expected, 2e-6)
    state = told[0]["weights"]
    assert state.keys() == alone["weights"].keys()
    for name, value in alone["weights"].items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6, msg=name)
    # Each weight's last part is filled up; what the ranks hold together is little more than the whole.
    share = 0.5 if case.startswith("zero3") else 1.0
    assert all(share <= rank["bytes"] / alone["bytes"] < share + 0.01 for rank in told)


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(case, ranks):
    for whole, again in ranks[case]:
        assert again["named"] == whole["named"][3:] and again["rollouts"] == whole["rollouts"][3:]
        assert again["weights"].keys() == whole["weights"].keys()
        assert all(torch.equal(again["weights"][name], value) for name, value in whole["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("case", EMPTY)
def test_a_step_without_a_loss_token_changes_no_weight_and_keeps_the_schedule(case, ranks, tmp_path):
    alone = EMPTY[case](1, tmp_path)
    for rank in ranks[case]:
        for mine, expected in zip(rank["named"], alone["named"], strict=True):
            assert mine["train/lr"] == expected["train/lr"] and mine["train/tokens"] == expected["train/tokens"]
        assert rank["named"][1]["train/loss"] == rank["named"][1]["train/grad_norm"] == 0
    first, second, third = ranks[case][0]["weights"]
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert not all(torch.equal(third[name], value) for name, value in second.items())


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF)
def test_half_precision_trains_as_autocast_does_but_for_rounding(case, ranks):
    """Weights that are read are bf16 here and float32 there; what the optimizer moves is float32 in both."""
    for ours, ddp in ranks[case]:
        losses = [[record["train/loss"] for record in told["named"]] for told in (ours, ddp)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert losses[1][-1] < 0.95 * losses[1][0]
    dtypes = [{value.dtype for value in told["weights"].values()} for told in ranks[case][0]]
    assert dtypes == [{torch.bfloat16}, {torch.float32}]  # and so the second training was not DeepSpeed's


@pytest.mark.slow
def test_a_gathered_student_answers_one_rank_alone(ranks):
    first, _ = ranks["alone"]
    torch.testing.assert_close(*first["logits"], rtol=0, atol=1e-6)
    assert first["communicates"] == (True, False)


@pytest.mark.slow
def test_models_load_whole_while_stage_3_trains(ranks):
    assert not any(rank["loads_in_parts"] for rank in ranks["alone"])


@pytest.mark.slow
def test_the_base_under_an_adapter_lies_as_the_student_does(ranks):
    assert ranks["base"] == [(True, False)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", FROZEN)
def test_a_teacher_in_parts_says_what_the_whole_one_does(case, ranks):
    for rank in ranks[case]:
        assert all(torch.equal(said, rank["before"]) for said in rank["said"])
        assert torch.equal(*rank["head"])
        whole, part = rank["bytes"]
        assert 0.5 <= part / whole < 0.51
        assert str(rank["dtypes"]) == f"{{{case.split()[-1]}}}"


@pytest.mark.slow
def test_a_killed_run_continues_to_the_bit(tmp_path):
    _, whole, broken = killed_and_whole(SAMPLING, 2, write_inputs(tmp_path), tmp_path, "hardware.sharding=zero3")
    assert_equal_to_the_bit(whole, broken)


# The JSON


def hardware(sharding="zero3", **more):
    return changed(tiny_config(SAMPLING), hardware={"processes_per_node": 2, "sharding": sharding, **more}).hardware


@pytest.mark.parametrize("stage", STAGES)
def test_the_own_json_leaves_to_the_run_what_is_the_runs(stage):
    config = deepspeed_config(hardware(stage, precision="bf16"))
    assert f"zero{config['zero_optimization']['stage']}" == stage
    assert config["gradient_clipping"] == config["train_batch_size"] == config["gradient_accumulation_steps"] == "auto"
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]
    assert not {"optimizer", "scheduler"} & config.keys()


ZERO = {"zero_optimization": {"stage": 3}}
REFUSED = {
    "is no JSON": "{stage: 3}",
    "has no zero_optimization": {"bf16": {"enabled": "auto"}},
    "zero_optimization.stage=2 contradicts hardware.sharding=zero3": {"zero_optimization": {"stage": 2}},
    "its optimizer would replace train.optimizer": {**ZERO, "optimizer": {"type": "AdamW"}},
    "its scheduler would replace train.lr_scheduler": {**ZERO, "scheduler": {"type": "WarmupLR"}},
    "train_micro_batch_size_per_gpu=4: train.micro_batch_size says it": {**ZERO, "train_micro_batch_size_per_gpu": 4},
    "gradient_clipping=0.5: train.max_grad_norm says it": {**ZERO, "gradient_clipping": 0.5},
    "zero_force_ds_cpu_optimizer=true would replace train.optimizer": {**ZERO, "zero_force_ds_cpu_optimizer": True},
    "bf16.enabled=true contradicts hardware.precision=fp32": {**ZERO, "bf16": {"enabled": True}},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_json_that_contradicts_the_run_is_refused_in_one_line(reason, tmp_path):
    file, content = tmp_path / "own.json", REFUSED[reason]
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    settings = hardware(deepspeed=str(file))
    with pytest.raises(ConfigError) as refused:
        deepspeed_config(settings)
    assert reason in str(refused.value) and str(refused.value).startswith(f"hardware.deepspeed={file}: ")
    assert len(str(refused.value).splitlines()) == 1
    config = tiny_config(SAMPLING).model_copy(update={"hardware": settings})
    assert hardware_problems(config) == [str(refused.value)]


def test_a_json_of_ones_own_is_used(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    config = deepspeed_config(hardware(deepspeed=str(file)))
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["zero_force_ds_cpu_optimizer"] is False  # or accelerate would train by another optimizer
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def test_sums_of_gradients_in_float32_are_refused_where_they_come_out_wrong(tmp_path):
    """DeepSpeed 0.19.8 told a third of the norm of a step of three micro-batches; stages 2 and 3 are right."""
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}))
    with pytest.raises(ConfigError, match="number of micro-batches once more"):
        deepspeed_config(hardware("zero1", deepspeed=str(file), precision="bf16"))
    deepspeed_config(hardware("zero1", deepspeed=str(file)))


def test_an_average_of_weights_in_parts_is_refused():
    config = tiny_config(AVERAGING).model_copy(update={"hardware": hardware()})
    (problem,) = hardware_problems(config)
    assert problem.startswith("hardware.sharding=zero3: ") and problem.endswith("use fsdp2 or zero2")
