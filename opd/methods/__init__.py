"""The methods, by the name that `method=` takes. A new one adds its line here, and nothing else anywhere."""

from opd.methods.gkd import GKD
from opd.methods.reverse_kl import ReverseKL
from opd.methods.sft import SFT
from opd.protocols import Method

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "gkd": GKD,
    "reverse_kl": ReverseKL,
}
