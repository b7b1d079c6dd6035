"""What long-tailed recognition uses beside RIDE: losses, samplers, subsets, reports."""

from ride_plugin._cosine import CosineClassifier
from ride_plugin.longtail._analysis import Analysis, analyze
from ride_plugin.longtail._bias_variance import BiasVariance, bias_variance
from ride_plugin.longtail._calibration_error import expected_calibration_error
from ride_plugin.longtail._classifiers import (
    find_classifiers,
    freeze_representation,
    reset_classifiers,
)
from ride_plugin.longtail._focal import FocalLoss
from ride_plugin.longtail._ldam import LDAMLoss
from ride_plugin.longtail._logit_adjustment import (
    BalancedSoftmaxLoss,
    LogitAdjustedLoss,
    adjust_logits,
)
from ride_plugin.longtail._prior_shift import PriorCalibration, PriorEstimate, calibrate_prior
from ride_plugin.longtail._reweighting import DeferredReweighting, effective_number_weights
from ride_plugin.longtail._sampler import ClassBalancedSampler
from ride_plugin.longtail._shots import ShotReport, shot_report
from ride_plugin.longtail._splits import BySplit, shot_groups
from ride_plugin.longtail._subset import LongTailedSubset, long_tailed_counts, long_tailed_indices
from ride_plugin.longtail._tau_norm import tau_normalize, tau_normalized
from ride_plugin.longtail._weight_scaling import LearnableWeightScaling, learnable_weight_scaling

__all__ = [
    "Analysis",
    "BalancedSoftmaxLoss",
    "BiasVariance",
    "BySplit",
    "ClassBalancedSampler",
    "CosineClassifier",
    "DeferredReweighting",
    "FocalLoss",
    "LDAMLoss",
    "LearnableWeightScaling",
    "LogitAdjustedLoss",
    "LongTailedSubset",
    "PriorCalibration",
    "PriorEstimate",
    "ShotReport",
    "adjust_logits",
    "analyze",
    "bias_variance",
    "calibrate_prior",
    "effective_number_weights",
    "expected_calibration_error",
    "find_classifiers",
    "freeze_representation",
    "learnable_weight_scaling",
    "long_tailed_counts",
    "long_tailed_indices",
    "reset_classifiers",
    "shot_groups",
    "shot_report",
    "tau_normalize",
    "tau_normalized",
]
