"""Stage two and serving: which samples need one more expert, and who leaves early."""

from ride_plugin._output import RouterInputs
from ride_plugin._split import TrunkState
from ride_plugin.routing._confidence import ConfidenceRouter
from ride_plugin.routing._exit import RoutingOutput
from ride_plugin.routing._fused import fuse_stages
from ride_plugin.routing._inference import RoutingInference
from ride_plugin.routing._int8 import quantize_stages
from ride_plugin.routing._loss import RoutingLoss
from ride_plugin.routing._queue import RoutingQueue
from ride_plugin.routing._report import RoutingReport, routing_report
from ride_plugin.routing._router import ExpertRouter
from ride_plugin.routing._runner import StagedRunner
from ride_plugin.routing._threshold import (
    CalibrationResult,
    ExitCurve,
    LongTailedCalibrationWarning,
)

__all__ = [
    "CalibrationResult",
    "ConfidenceRouter",
    "ExitCurve",
    "ExpertRouter",
    "LongTailedCalibrationWarning",
    "RouterInputs",
    "RoutingInference",
    "RoutingLoss",
    "RoutingOutput",
    "RoutingQueue",
    "RoutingReport",
    "StagedRunner",
    "TrunkState",
    "fuse_stages",
    "quantize_stages",
    "routing_report",
]
