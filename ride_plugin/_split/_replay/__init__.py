"""A pass over a cut backbone: one forward is recorded in the trunk and replayed in an expert.

- ``_tape`` records and replays; ``_hooks`` and ``_stand_ins`` tell it where units begin, and
  ``_passes`` runs it.
- ``_state`` is what crosses the cut: rows of it (``_rows``), where its tensors lie (``_form``), and
  values that nobody reads (``_hollow``).
- Forwards out of the ordinary: a unit that raises (``_raised``), a forward that ends in the middle
  (``_unwinding``), checkpoints (``_reentrant``), modules that are lists to a forward (``_listed``),
  and modules that run once more behind the fork (``_again``).
- ``_several`` is what a stand-in cannot hand out.
"""

from ride_plugin._split._replay._again import writers_in
from ride_plugin._split._replay._form import (
    form_of,
    form_of_inputs,
    plain_in,
    single_in,
    versions_in,
)
from ride_plugin._split._replay._hollow import hollow, is_hollow, reads
from ride_plugin._split._replay._hooks import (
    FeatureHook,
    ForkHook,
    StartHook,
    UnitHooks,
    belongs_to,
    drop_hooks,
    expert_at,
    module_at,
    places_of_forks,
    places_of_units,
    put_fork_hooks_first,
    watch_classifier,
)
from ride_plugin._split._replay._listed import list_all, list_own, list_whole
from ride_plugin._split._replay._passes import (
    own_containers,
    play,
    read_attributes,
    record,
    take_up,
    write_attributes,
)
from ride_plugin._split._replay._reentrant import passed_by
from ride_plugin._split._replay._rows import Rows, find_rows, take_rows
from ride_plugin._split._replay._several import called
from ride_plugin._split._replay._stand_ins import (
    FREEZING,
    HOOKING,
    Forked,
    Recorded,
    StandIn,
    asked_for_classes,
)
from ride_plugin._split._replay._state import Absent, Layout, TrunkState
from ride_plugin._split._replay._tape import NoHandle, Running, operation_name
from ride_plugin._split._replay._unwinding import Unwinding

__all__ = [
    "FREEZING",
    "HOOKING",
    "Absent",
    "FeatureHook",
    "ForkHook",
    "Forked",
    "Layout",
    "NoHandle",
    "Recorded",
    "Rows",
    "Running",
    "StandIn",
    "StartHook",
    "TrunkState",
    "UnitHooks",
    "Unwinding",
    "asked_for_classes",
    "belongs_to",
    "called",
    "drop_hooks",
    "expert_at",
    "find_rows",
    "form_of",
    "form_of_inputs",
    "hollow",
    "is_hollow",
    "list_all",
    "list_own",
    "list_whole",
    "module_at",
    "operation_name",
    "own_containers",
    "passed_by",
    "places_of_forks",
    "places_of_units",
    "plain_in",
    "play",
    "put_fork_hooks_first",
    "read_attributes",
    "reads",
    "record",
    "single_in",
    "take_rows",
    "take_up",
    "versions_in",
    "watch_classifier",
    "write_attributes",
    "writers_in",
]
