"""Stage one: what the experts learn."""

from ride_plugin.losses._distillation import DistillationLoss
from ride_plugin.losses._diversity import DiversityLoss
from ride_plugin.losses._experts_loss import experts_loss
from ride_plugin.losses._ride_loss import RIDELoss
from ride_plugin.losses._temperature import TemperatureSchedule

__all__ = ["DistillationLoss", "DiversityLoss", "RIDELoss", "TemperatureSchedule", "experts_loss"]
