"""How a backbone becomes trunk and experts: record and replay, fork, views, self-check."""

from ride_plugin._split._analysis import throwaway
from ride_plugin._split._build import split_backbone
from ride_plugin._split._classifier import replace_classifier
from ride_plugin._split._graft import graft_experts
from ride_plugin._split._join import joined_by, warn_if_equal
from ride_plugin._split._module import SplitModule
from ride_plugin._split._parts import Split
from ride_plugin._split._passes import play, read_attributes, record, write_attributes
from ride_plugin._split._plain import plain_modules
from ride_plugin._split._rows import Rows, take_rows
from ride_plugin._split._state import TrunkState, hollow
from ride_plugin._split._tape import Recorded

__all__ = [
    "Recorded",
    "Rows",
    "Split",
    "SplitModule",
    "TrunkState",
    "graft_experts",
    "hollow",
    "joined_by",
    "plain_modules",
    "play",
    "read_attributes",
    "record",
    "replace_classifier",
    "split_backbone",
    "take_rows",
    "throwaway",
    "warn_if_equal",
    "write_attributes",
]
