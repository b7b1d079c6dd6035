"""RIDE for any PyTorch codebase: see https://arxiv.org/abs/2010.01809 and the README."""

from ride_plugin import functional, longtail, routing
from ride_plugin._budget import plan
from ride_plugin._convert import load_official_checkpoint
from ride_plugin._cost import cost_report, count_flops
from ride_plugin._errors import (
    ArgumentError,
    CheckpointError,
    MissingExpertLogitsError,
    ReplayError,
    RIDEError,
    SplitError,
    VersionError,
    WidthError,
)
from ride_plugin._loss_module import RIDEModule
from ride_plugin._output import ExpertOutput, expert_logits
from ride_plugin._version import __version__
from ride_plugin._wrapper import RIDEWrapper
from ride_plugin.losses import (
    DistillationLoss,
    DiversityLoss,
    RIDELoss,
    TemperatureSchedule,
    experts_loss,
)
from ride_plugin.routing import ConfidenceRouter, ExpertRouter, RoutingInference, RoutingLoss

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "ConfidenceRouter",
    "DistillationLoss",
    "DiversityLoss",
    "ExpertOutput",
    "ExpertRouter",
    "MissingExpertLogitsError",
    "RIDEError",
    "RIDELoss",
    "RIDEModule",
    "RIDEWrapper",
    "ReplayError",
    "RoutingInference",
    "RoutingLoss",
    "SplitError",
    "TemperatureSchedule",
    "VersionError",
    "WidthError",
    "__version__",
    "cost_report",
    "count_flops",
    "expert_logits",
    "experts_loss",
    "functional",
    "load_official_checkpoint",
    "longtail",
    "plan",
    "routing",
]
