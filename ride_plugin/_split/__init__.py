"""How a backbone becomes trunk and experts: record and replay, fork, views, self-check.

Where to read first, and what belongs together:

- *A pass.* ``_tape`` records a forward and replays it; ``_hooks`` and ``_stand_ins`` tell it where
  units begin, ``_passes`` runs it, ``_state`` is what crosses the cut (``_rows``, ``_form``,
  ``_hollow``). Forwards out of the ordinary: ``_raised``, ``_unwinding``, ``_reentrant``,
  ``_listed``.
- *The build.* ``_build`` calls the steps one after the other: a copy (``_source``, ``_copies``,
  ``_settings``); what one forward of it shows (``_examine``): an example (``_example``, ``_meta``),
  the calls (``_probe``, ``_units``), the logits (``_logits``, ``_classifier``,
  ``_positions``, ``_training_output``, ``_beside``, ``_activated``); the fork (``_fork``); two
  copies with stand-ins (``_views``); what crosses between them (``_learn``, ``_use``); and the
  self-check (``_check``, ``_check_rows``, ``_results``).
- *What cannot be cut there*, and is refused by name: ``_feedback``, ``_once``, ``_hidden``,
  ``_references``, ``_modes``, ``_unseen``, ``_again``, ``_set_behind``; what routing would mix is
  ``_kept_rows``.
- *The model.* ``_module`` is made of ``_parts``, knows ways through the forward (``_paths``, which
  keeps hooks of others out by ``_observers``) and reads what experts return (``_expert_result``,
  ``_features``).
  Tensors that all experts have are ``_sharing`` and ``_frozen``, loading and saving ``_holder``,
  ``_lend`` and ``_plain_state``, groups of parameters ``_groups``, new classifiers
  ``_new_classifier``, and another number of classes ``_class_number``. What somebody does to the
  wrong part of a model is told by ``_misplaced``, ``_several`` and ``_handed_out``, what the
  backbone's class overrides by ``_passed_by``.
- *Other ways in and out.* Two modules as one backbone (``_pair``), parts written by hand
  (``_join``), experts from networks of their own (``_graft``, ``_inert``), and back to a plain
  module (``_plain``).
"""

from ride_plugin._split._beside import losses_beside
from ride_plugin._split._build import reason_of_fork, split_backbone
from ride_plugin._split._copies import COMPILED_CALL
from ride_plugin._split._expert_result import check_logits_of_half, refuse_lost_dimension
from ride_plugin._split._form import form_of, plain_in
from ride_plugin._split._graft import graft_experts
from ride_plugin._split._groups import merged_groups
from ride_plugin._split._holder import Holder
from ride_plugin._split._hollow import hollow
from ride_plugin._split._hooks import put_fork_hooks_first
from ride_plugin._split._inert import inert_parameters
from ride_plugin._split._join import join_parts
from ride_plugin._split._kept_rows import kept_rows_of
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
from ride_plugin._split._new_classifier import replace_classifiers
from ride_plugin._split._pair import Pair
from ride_plugin._split._parts import Parts, Split, feature_dim_of, replicate
from ride_plugin._split._passes import (
    own_containers,
    play,
    read_attributes,
    record,
    write_attributes,
)
from ride_plugin._split._plain import plain_modules, plain_views
from ride_plugin._split._plain_state import is_same, refuse_plain_state, refuse_state_of_part
from ride_plugin._split._probe import Call, is_same_tensor
from ride_plugin._split._rows import Rows, take_rows
from ride_plugin._split._settings import held_together_by, unchanged
from ride_plugin._split._several import called
from ride_plugin._split._sharing import held_by_all
from ride_plugin._split._stand_ins import Recorded, StandIn
from ride_plugin._split._state import TrunkState
from ride_plugin._split._tape import operation_name
from ride_plugin._split._unwinding import Unwinding
from ride_plugin._split._views import Views

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
