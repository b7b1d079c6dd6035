"""RIDE for any PyTorch codebase: see https://arxiv.org/abs/2010.01809 and the README."""

from ride_plugin import functional
from ride_plugin.routing._threshold import CalibrationResult, ExitCurve, LongTailedCalibrationWarning
from ride_plugin._convert._official import OfficialCheckpoint, load_official_checkpoint
from ride_plugin.routing._confidence import ConfidenceRouter
from ride_plugin._cost import CostReport, cost_report, count_flops
from ride_plugin.routing._export import StagedRunner, export_stages
from ride_plugin.losses._distillation import DistillationLoss
from ride_plugin.losses._diversity import DiversityLoss
from ride_plugin._errors import (
    ArgumentError,
    CheckpointError,
    MissingExpertLogitsError,
    ReplayError,
    RIDEError,
    SplitError,
    WidthError,
)
from ride_plugin.losses._experts_loss import experts_loss
from ride_plugin.routing._inference import RoutingInference, RoutingOutput
from ride_plugin._convert._fold_batchnorm import optimize_for_inference
from ride_plugin._output import ExpertOutput, RouterInputs, expert_logits
from ride_plugin._budget import Plan, PlanRow, plan
from ride_plugin.routing._queue import RoutingQueue
from ride_plugin.routing._router import ExpertRouter
from ride_plugin.routing._loss import RoutingLoss
from ride_plugin.routing._report import RoutingReport, routing_report
from ride_plugin._split import CosineClassifier, TrunkState
from ride_plugin.losses._temperature import TemperatureSchedule
from ride_plugin._version import __version__
from ride_plugin._wrapper import RIDEWrapper

__all__ = [
    "ArgumentError",
    "CalibrationResult",
    "CheckpointError",
    "ConfidenceRouter",
    "CosineClassifier",
    "CostReport",
    "DistillationLoss",
    "DiversityLoss",
    "ExitCurve",
    "ExpertOutput",
    "ExpertRouter",
    "LongTailedCalibrationWarning",
    "MissingExpertLogitsError",
    "OfficialCheckpoint",
    "Plan",
    "PlanRow",
    "RIDEError",
    "RIDEWrapper",
    "ReplayError",
    "RouterInputs",
    "RoutingInference",
    "RoutingLoss",
    "RoutingOutput",
    "RoutingQueue",
    "RoutingReport",
    "SplitError",
    "StagedRunner",
    "TemperatureSchedule",
    "TrunkState",
    "WidthError",
    "__version__",
    "cost_report",
    "count_flops",
    "expert_logits",
    "experts_loss",
    "export_stages",
    "functional",
    "load_official_checkpoint",
    "optimize_for_inference",
    "plan",
    "routing_report",
]
