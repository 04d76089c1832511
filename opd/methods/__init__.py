"""The methods, by the name that `method=` takes. A new one adds its line here, and nothing else anywhere."""

from opd.methods.adpa import ADPA
from opd.methods.dckd import DCKD
from opd.methods.dpo import DPO
from opd.methods.gkd import GKD
from opd.methods.gold import GOLD
from opd.methods.minillm import MiniLLM
from opd.methods.opsd import OPSD
from opd.methods.reverse_kl import ReverseKL
from opd.methods.sft import SFT
from opd.protocols import Method

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "dpo": DPO,
    "dckd": DCKD,
    "adpa": ADPA,
    "gkd": GKD,
    "gold": GOLD,
    "minillm": MiniLLM,
    "opsd": OPSD,
    "reverse_kl": ReverseKL,
}
