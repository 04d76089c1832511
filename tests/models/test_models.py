"""What is done to a model before it trains: dropout off in every family, adapters where the loss can see them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd.config import LoRA
from opd.errors import ConfigError
from opd.models import add_lora, disable_dropout, hidden_states

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# Families that keep their rates in different places: attributes, module.config, layerdrop, nn.Dropout.
FAMILIES = {
    "llama": {**SMALL, "num_key_value_heads": 2, "intermediate_size": 64, "attention_dropout": 0.5},
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5, "layerdrop": 0.5},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.5},
    "falcon": {**SMALL, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "starcoder2": {**SMALL, "intermediate_size": 64, "residual_dropout": 0.5, "embedding_dropout": 0.5},
    "gpt_neox": {**SMALL, "intermediate_size": 64, "hidden_dropout": 0.5},
}


def build(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **{**FAMILIES[family], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_the_training_forward_is_the_evaluated_one(family):
    model = build(family)
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(1))

    def difference():
        with torch.no_grad():
            trained = hidden_states(model.train(), ids, torch.ones_like(ids))
            evaluated = hidden_states(model.eval(), ids, torch.ones_like(ids))
        return (trained - evaluated).abs().max().item()

    assert difference() > 1e-3  # the family does drop, so the assertion below can fail
    disable_dropout(model)
    assert difference() == 0


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"]])
def test_adapters_on_the_head_are_refused(targets):
    with pytest.raises(ConfigError, match=r"model\.student\.lora\.targets=.*output head"):
        add_lora(build("llama"), LoRA(r=2, alpha=2, dropout=0.0, targets=targets))


def test_adapters_everywhere_else_are_taken():
    adapted = add_lora(build("llama"), LoRA(r=2, alpha=2, dropout=0.0, targets="all-linear"))
    assert sum(parameter.requires_grad for parameter in adapted.parameters()) == 28
