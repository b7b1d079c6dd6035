"""Copies of a backbone and its parts, and what stays one object in the backbone and in all of them.

``_copies`` makes the copies that the build runs and throws away. ``_settings`` are objects that
backbone and parts go on to share, ``_references`` leads out of a copy and back to the backbone, and
``_sharing`` tells which tensors exist once for all experts. ``_writes`` tells what a pass writes,
and keeps the weights from one that is thrown away.
"""

from ride_plugin._split._copying._copies import (
    COMPILED_CALL,
    clone_module,
    copy_with_hooks,
    detached_activations,
    running_copy,
    same_values,
    written_parameters,
)
from ride_plugin._split._copying._references import (
    captured_by,
    hook_owners,
    refuse_captured,
    warn_of_outside_hooks,
)
from ride_plugin._split._copying._settings import (
    as_they_are,
    contents_in,
    contents_of,
    held_together_by,
    settings_at,
    state_of,
    unchanged,
)
from ride_plugin._split._copying._sharing import (
    Group,
    complete_shared,
    count_parameters,
    frozen_layers,
    held_by_all,
    held_together,
    hold_together,
    trains,
    unchanging,
)
from ride_plugin._split._copying._writes import Writes, storage_of, weights_kept

__all__ = [
    "COMPILED_CALL",
    "Group",
    "Writes",
    "as_they_are",
    "captured_by",
    "clone_module",
    "complete_shared",
    "contents_in",
    "contents_of",
    "copy_with_hooks",
    "count_parameters",
    "detached_activations",
    "frozen_layers",
    "held_by_all",
    "held_together",
    "held_together_by",
    "hold_together",
    "hook_owners",
    "refuse_captured",
    "running_copy",
    "same_values",
    "settings_at",
    "state_of",
    "storage_of",
    "trains",
    "unchanged",
    "unchanging",
    "warn_of_outside_hooks",
    "weights_kept",
    "written_parameters",
]
