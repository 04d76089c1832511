"""DeepSpeed's JSON: opd's own of launchers/deepspeed, or the one that hardware.deepspeed names. No torch here.

It says how things are sharded and moved. Optimizer, schedule, batch sizes, clipping and precision are opd's: such a key
may be left out or be "auto", and is filled from train.* and hardware.* then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.config import Hardware
from opd.errors import ConfigError

_HERE = Path(__file__).resolve().parent
_OWN = (_HERE / "deepspeed", _HERE.parent / "launchers" / "deepspeed")  # of a wheel, of a checkout
_FILLED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
}
_REPLACED = {"optimizer": "train.optimizer", "scheduler": "train.lr_scheduler"}


def deepspeed_config(hardware: Hardware) -> dict[str, Any]:
    """The JSON of a ZeRO run, with "auto" for what transformers fills in. Raises ConfigError for one that is wrong."""
    own = next((folder for folder in _OWN if folder.is_dir()), _OWN[0]) / f"{hardware.sharding}.json"
    path = own if hardware.deepspeed is None else Path(hardware.deepspeed)
    setting = f"hardware.deepspeed={hardware.deepspeed}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path} is no JSON ({error}); mend it, or set it to null") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise ConfigError(f"{setting}: has no zero_optimization; add it, or set hardware.deepspeed to null")
    if f"zero{zero.get('stage')}" != hardware.sharding:
        stage = f"zero_optimization.stage={zero.get('stage')}"
        raise ConfigError(f"{setting}: {stage} contradicts hardware.sharding={hardware.sharding}; change either")
    for name, ours in _REPLACED.items():
        if name in config:
            raise ConfigError(f"{setting}: its {name} would replace {ours}; remove it from the file")
    for name, ours in _FILLED.items():
        if config.setdefault(name, "auto") != "auto":
            raise ConfigError(f'{setting}: {name}={config[name]}: {ours} says it; set it to "auto" in the file')
    # What is offloaded would be trained by a CPU Adam of DeepSpeed's, compiled first, whatever the optimizer is.
    if config.setdefault("zero_force_ds_cpu_optimizer", False):
        raise ConfigError(
            f"{setting}: zero_force_ds_cpu_optimizer=true would replace train.optimizer; remove it from the file"
        )
    _set_precision(config, setting, hardware.precision)
    if hardware.sharding == "zero1" and config["bf16"]["enabled"] and config.get("data_types"):
        raise ConfigError(
            f"{setting}: data_types={json.dumps(config['data_types'])}: under ZeRO-1 such gradients are divided by the "
            "number of micro-batches once more; remove it from the file, or use hardware.sharding=zero2"
        )
    if hardware.sharding == "zero3":  # or a checkpoint would hold no weights that anything else can read
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return config


def _set_precision(config: dict[str, Any], setting: str, precision: str) -> None:
    for name in ("bf16", "fp16"):
        section = config.get(name, {})
        enabled = section.get("enabled", "auto") if isinstance(section, dict) else section
        if enabled not in ("auto", precision == name):
            raise ConfigError(
                f"{setting}: {name}.enabled={json.dumps(enabled)} contradicts hardware.precision={precision}; "
                'set it to "auto" in the file'
            )
        config[name] = {**(section if isinstance(section, dict) else {}), "enabled": precision == name}
