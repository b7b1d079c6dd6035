"""Stage one: what the experts learn.

``_experts_loss`` applies a criterion to each expert, ``_diversity`` pays experts for disagreeing
(at the temperatures of ``_temperature``), and ``_ride_loss`` is both in one. At its first call that
looks at the criterion (``_first_call``, ``_seen_logits``) by calls of a copy (``_trials``,
``_trial_copy``). ``_distillation`` learns from a teacher.
"""

from ride_plugin.losses._distillation import DistillationLoss
from ride_plugin.losses._diversity import DiversityLoss
from ride_plugin.losses._experts_loss import experts_loss
from ride_plugin.losses._ride_loss import RIDELoss
from ride_plugin.losses._temperature import TemperatureSchedule

__all__ = ["DistillationLoss", "DiversityLoss", "RIDELoss", "TemperatureSchedule", "experts_loss"]
