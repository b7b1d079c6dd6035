"""How a backbone becomes trunk and experts: record and replay, fork, views, self-check."""

from ride_plugin._split._beside import losses_beside
from ride_plugin._split._build import reason_of_fork, split_backbone
from ride_plugin._split._classifier import replace_classifiers
from ride_plugin._split._copies import COMPILED_CALL
from ride_plugin._split._graft import graft_experts
from ride_plugin._split._groups import merged_groups
from ride_plugin._split._holder import Holder
from ride_plugin._split._hollow import hollow
from ride_plugin._split._hooks import put_fork_hooks_first
from ride_plugin._split._inert import inert_parameters
from ride_plugin._split._join import join_parts
from ride_plugin._split._learn import throwaway
from ride_plugin._split._logits import (
    Choice,
    check_logits_choice,
    losses_dropped,
    reader_in,
    whole_outputs,
)
from ride_plugin._split._meta import on_meta
from ride_plugin._split._misplaced import is_real, real_parts
from ride_plugin._split._module import SplitModule
from ride_plugin._split._pair import Pair
from ride_plugin._split._parts import Parts, Split, feature_dim_of, replicate
from ride_plugin._split._passes import (
    own_containers,
    play,
    read_attributes,
    record,
    write_attributes,
)
from ride_plugin._split._plain import plain_modules
from ride_plugin._split._probe import Call
from ride_plugin._split._rows import Rows, take_rows
from ride_plugin._split._settings import held_together_by, unchanged
from ride_plugin._split._several import called
from ride_plugin._split._sharing import held_by_all
from ride_plugin._split._stand_ins import Forked, Recorded
from ride_plugin._split._state import TrunkState
from ride_plugin._split._unwinding import Unwinding
from ride_plugin._split._views import Views

__all__ = [
    "COMPILED_CALL",
    "Call",
    "Choice",
    "Forked",
    "Holder",
    "Pair",
    "Parts",
    "Recorded",
    "Rows",
    "Split",
    "SplitModule",
    "TrunkState",
    "Unwinding",
    "Views",
    "called",
    "check_logits_choice",
    "feature_dim_of",
    "graft_experts",
    "held_by_all",
    "held_together_by",
    "hollow",
    "inert_parameters",
    "is_real",
    "join_parts",
    "losses_beside",
    "losses_dropped",
    "merged_groups",
    "on_meta",
    "own_containers",
    "plain_modules",
    "play",
    "put_fork_hooks_first",
    "read_attributes",
    "reader_in",
    "real_parts",
    "reason_of_fork",
    "record",
    "replace_classifiers",
    "replicate",
    "split_backbone",
    "take_rows",
    "throwaway",
    "unchanged",
    "whole_outputs",
    "write_attributes",
]
