"""How a backbone becomes trunk and experts."""

from ride_plugin._split._build import Split, split_backbone
from ride_plugin._split._classifier import CosineClassifier
from ride_plugin._split._module import SplitModule
from ride_plugin._split._state import TrunkState

__all__ = ["CosineClassifier", "Split", "SplitModule", "TrunkState", "split_backbone"]
