"""How a backbone becomes trunk and experts: record and replay, fork, views, self-check.

From the ground up, and each package imports those above it in this list only:

- ``_copying``: copies, and what stays one object in all of them.
- ``_examine``: what one forward shows: the calls, the logits, and where to fork.
- ``_replay``: a pass, recorded in the trunk and replayed in an expert.
- ``_cut`` and ``_saving``: two copies with stand-ins, what crosses between them; states.
- ``_verify``: the self-check, and what is refused.
- ``_attempt`` learns a cut and verifies it, ``_build`` calls all these, one after the other.
- ``_ways``: parts written by hand, experts of one's own, and back to a plain module.
- ``_module`` is the model: it knows ways through the forward (``_paths``), reads what experts
  return (``_expert_result``), groups parameters (``_groups``), tells of values that it handed out
  (``_handed_out``), and gets new classifiers (``_new_classifier``) with another number of classes
  (``_class_number``).
"""

from ride_plugin._split._build import reason_of_fork, split_backbone
from ride_plugin._split._copying import COMPILED_CALL, held_by_all, held_together_by, unchanged
from ride_plugin._split._cut import (
    Parts,
    Split,
    Views,
    feature_dim_of,
    is_real,
    real_parts,
    replicate,
    throwaway,
)
from ride_plugin._split._examine import (
    Call,
    Choice,
    check_logits_choice,
    is_same_tensor,
    losses_beside,
    losses_dropped,
    on_meta,
    reader_in,
    whole_outputs,
)
from ride_plugin._split._expert_result import check_logits_of_half, refuse_lost_dimension
from ride_plugin._split._groups import merged_groups
from ride_plugin._split._module import SplitModule
from ride_plugin._split._new_classifier import replace_classifiers
from ride_plugin._split._replay import (
    Recorded,
    Rows,
    StandIn,
    TrunkState,
    Unwinding,
    called,
    form_of,
    hollow,
    operation_name,
    own_containers,
    plain_in,
    play,
    put_fork_hooks_first,
    read_attributes,
    record,
    take_rows,
    write_attributes,
)
from ride_plugin._split._saving import (
    Holder,
    Pair,
    is_same,
    refuse_plain_state,
    refuse_state_of_part,
)
from ride_plugin._split._verify import kept_rows_of
from ride_plugin._split._ways import (
    graft_experts,
    inert_parameters,
    join_parts,
    plain_modules,
    plain_views,
)

__all__ = [
    "COMPILED_CALL",
    "Call",
    "Choice",
    "Holder",
    "Pair",
    "Parts",
    "Recorded",
    "Rows",
    "Split",
    "SplitModule",
    "StandIn",
    "TrunkState",
    "Unwinding",
    "Views",
    "called",
    "check_logits_choice",
    "check_logits_of_half",
    "feature_dim_of",
    "form_of",
    "graft_experts",
    "held_by_all",
    "held_together_by",
    "hollow",
    "inert_parameters",
    "is_real",
    "is_same",
    "is_same_tensor",
    "join_parts",
    "kept_rows_of",
    "losses_beside",
    "losses_dropped",
    "merged_groups",
    "on_meta",
    "operation_name",
    "own_containers",
    "plain_in",
    "plain_modules",
    "plain_views",
    "play",
    "put_fork_hooks_first",
    "read_attributes",
    "reader_in",
    "real_parts",
    "reason_of_fork",
    "record",
    "refuse_lost_dimension",
    "refuse_plain_state",
    "refuse_state_of_part",
    "replace_classifiers",
    "replicate",
    "split_backbone",
    "take_rows",
    "throwaway",
    "unchanged",
    "whole_outputs",
    "write_attributes",
]
