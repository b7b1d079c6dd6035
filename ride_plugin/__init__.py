"""RIDE for any PyTorch codebase: see https://arxiv.org/abs/2010.01809 and the README."""

from ride_plugin._output import ExpertOutput, RouterInputs, expert_logits
from ride_plugin._split import CosineClassifier, TrunkState
from ride_plugin._version import __version__
from ride_plugin._wrapper import RIDEWrapper

__all__ = [
    "CosineClassifier",
    "ExpertOutput",
    "RIDEWrapper",
    "RouterInputs",
    "TrunkState",
    "__version__",
    "expert_logits",
]
