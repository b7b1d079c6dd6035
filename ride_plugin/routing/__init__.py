"""Stage two and serving: which samples need one more expert, and who leaves early.

- *Gates*: ``_router`` and ``_confidence`` decide, ``_loss`` trains, ``_report`` counts.
- *The exit*: ``_exit`` is the one walk through trunk, experts and gates. ``_inference`` and
  ``_queue`` take it with a model, ``_runner`` with exported stages (``_protocols``).
- *The threshold*: ``_measure`` runs held-out data once, ``_threshold`` sweeps and chooses.
- *Stages*: ``_export`` makes them, with weights of their own (``_own``) and a description of their
  arguments (``_call``); ``_stages`` and ``_stage_inputs`` check what comes back. ``_fused`` makes
  them faster (``_rewrite``, ``_memory``, ``_fused_conv``), ``_int8`` in eight bits.
"""

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
