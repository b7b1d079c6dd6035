"""What one forward of a backbone shows: an example, the calls, the logits, and where to fork.

- ``_examine`` runs it, with the example given or a guessed one (``_example``), on a device without
  contents where that is enough (``_meta``).
- The calls of submodules (``_probe``), the units between which a backbone can be cut (``_units``),
  and the unit at which it is (``_fork``).
- The logits (``_logits``) and the layer that makes them (``_classifier``); where they are in
  training mode (``_training_output``), what comes beside them (``_beside``), and what looks like
  logits and is not: probabilities (``_activated``), scores of positions (``_positions``).
"""

from ride_plugin._split._examine._beside import losses_beside
from ride_plugin._split._examine._classifier import in_features_of
from ride_plugin._split._examine._examine import Examined, examine
from ride_plugin._split._examine._example import refuse_third_row
from ride_plugin._split._examine._fork import Fork, choose_fork
from ride_plugin._split._examine._logits import (
    Choice,
    LogitsReader,
    check_logits_choice,
    describe,
    losses_dropped,
    reader_in,
    spelled,
    whole_outputs,
)
from ride_plugin._split._examine._meta import on_meta
from ride_plugin._split._examine._probe import (
    RANDOM,
    Call,
    differ,
    is_same_tensor,
    mark_of,
    out_of_sight,
)

__all__ = [
    "RANDOM",
    "Call",
    "Choice",
    "Examined",
    "Fork",
    "LogitsReader",
    "check_logits_choice",
    "choose_fork",
    "describe",
    "differ",
    "examine",
    "in_features_of",
    "is_same_tensor",
    "losses_beside",
    "losses_dropped",
    "mark_of",
    "on_meta",
    "out_of_sight",
    "reader_in",
    "refuse_third_row",
    "spelled",
    "whole_outputs",
]
