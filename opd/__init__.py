"""opd: an experiment framework for distilling language models."""

import logging
import warnings

__version__ = "0.1.0"

# What libraries that a run imports say about things that this run does not ask of them, by logger. They give their
# loggers levels of their own, but leave filters alone.
_NOISE = {
    "DeepSpeed": "Setting accelerator to CPU",  # imported by accelerate where it is installed
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # imported by peft
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",  # every 8-bit layer, every time
}
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)  # peft asks by that name
warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # peft finds out, and then says so a layer

for _name, _opening in _NOISE.items():
    logging.getLogger(_name).addFilter(lambda record, opening=_opening: not record.getMessage().startswith(opening))
