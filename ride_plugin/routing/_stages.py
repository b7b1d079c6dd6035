"""What stages are handed over in: a mapping from their names to programs or functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ride_plugin._checks import refuse
from ride_plugin._errors import ArgumentError


def check_stages(stages: object, kind: Any, expected: str, made_by: str) -> None:
    """Refuse what is no mapping from names to stages of this kind, as ``isinstance`` takes it.

    Raises:
        ArgumentError: it is none; the message says that ``made_by`` returns such.
    """
    if not isinstance(stages, Mapping):
        refuse("stages", "a dict of stages by name", stages, f"Pass what {made_by} returned.")
    for name, stage in stages.items():
        if not isinstance(stage, kind):
            raise ArgumentError(
                f"Expected `stages[{name!r}]` to be {expected}, but got {type(stage).__name__}. "
                f"Pass what {made_by} returned."
            )


def count_experts(stages: Mapping[str, object]) -> int:
    """How many experts a full set of stages has.

    Raises:
        ArgumentError: a stage is missing, or a name is unknown. Gates count as well as experts:
            else a lost file of the last expert would mean a model with one expert less.
    """
    experts, gates = (
        sum(str(name).startswith(kind) for name in stages) for kind in ("expert_", "gate_")
    )
    count = max(experts, gates + 1)
    names = {"trunk", "expert_0"} | {f"expert_{index}" for index in range(count)}
    names |= {f"gate_{index}" for index in range(count - 1)}
    missing, unknown = sorted(names - stages.keys()), sorted(map(str, stages.keys() - names))
    if missing or unknown:
        found = [f"{missing} are missing"] if missing else []
        found += [f"{unknown} are unknown"] if unknown else []
        raise ArgumentError(
            "Expected argument `stages` to hold all that `export_stages` returned and nothing "
            f"else, but {' and '.join(found)}. Load the files of one export under its names."
        )
    return count
