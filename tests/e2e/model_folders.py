"""Model folders as users bring them: a family's shape with random weights, and a byte-level BPE tokenizer."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROWS = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(2, 7) for b in range(2, 6)]


def build_tokenizer(*, template: bool = True, reverse: bool = False) -> Any:
    """A byte-level BPE tokenizer; `reverse` gives the same number of ids to other tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"{question} {answer}" for question, answer in ROWS]
    tokenizer.train_from_iterator([line[::-1] for line in text] if reverse else text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>" if template else "<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML if template else None,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    folder: Path, family: str = "qwen3", *, width: int = 290, seed: int = 0, tokenizer: Any = None, positions: int = 128
) -> Path:
    """A folder that save_pretrained wrote; `width` rows in the embedding table, at least the tokenizer's."""
    import torch
    import transformers as hf

    tokenizer = tokenizer or build_tokenizer(template=family not in ("gpt2", "opt", "gpt_neox"))
    config_class, model_class = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
        "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM),
        "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel),
        "opt": (hf.OPTConfig, hf.OPTForCausalLM),
        "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM),
    }[family]
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": positions,
    }
    if family == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions}
    if family == "opt":
        shape |= {"ffn_dim": 32, "word_embed_proj_dim": 16}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class(config_class(vocab_size=width, **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[tuple[str, str]] = ROWS) -> Path:
    """Questions and answers in the format of the file's suffix; a .txt holds the questions alone."""
    pairs = [{"prompt": question, "completion": answer} for question, answer in rows]
    if path.suffix == ".txt":
        path.write_text("".join(f"{question}\n" for question, _ in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(pairs)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(pairs), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(pairs))
    else:
        messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
        path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in messages))
    return path


def file_run(run_dir: Path, data: Path, student: Path, teacher: Path | None, *more: str) -> list[str]:
    """The command's words: two short steps on the file's rows."""
    model = ["model/teacher=none"] if teacher is None else ["model/teacher=path", f"model.teacher.path={teacher}"]
    return [
        f"run.dir={run_dir}",
        "data=file",
        f"data.path={data}",
        "data.eval_prompts=4",
        "model/student=path",
        f"model.student.path={student}",
        *model,
        "train.max_steps=2",
        "train.batch_size=4",
        "rollout.max_completion_tokens=6",
        "rollout.group_size=1",
        *more,
    ]
