"""Other forms of a model: the authors' checkpoints, BatchNorm folded."""

from ride_plugin._convert._fold_batchnorm import optimize_for_inference
from ride_plugin._convert._official import OfficialCheckpoint, load_official_checkpoint

__all__ = [
    "OfficialCheckpoint",
    "load_official_checkpoint",
    "optimize_for_inference",
]
