"""RIDE for any PyTorch codebase: see https://arxiv.org/abs/2010.01809 and the README."""

from ride_plugin import functional
from ride_plugin._distillation import DistillationLoss
from ride_plugin._diversity import DiversityLoss
from ride_plugin._experts_loss import experts_loss
from ride_plugin._output import ExpertOutput, RouterInputs, expert_logits
from ride_plugin._router import ExpertRouter
from ride_plugin._routing_loss import RoutingLoss
from ride_plugin._split import CosineClassifier, TrunkState
from ride_plugin._temperature import TemperatureSchedule
from ride_plugin._version import __version__
from ride_plugin._wrapper import RIDEWrapper

__all__ = [
    "CosineClassifier",
    "DistillationLoss",
    "DiversityLoss",
    "ExpertOutput",
    "ExpertRouter",
    "RIDEWrapper",
    "RouterInputs",
    "RoutingLoss",
    "TemperatureSchedule",
    "TrunkState",
    "__version__",
    "expert_logits",
    "experts_loss",
    "functional",
]
