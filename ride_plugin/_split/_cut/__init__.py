"""The cut: two copies of a backbone with stand-ins, what crosses between them, and the parts.

- ``_source`` is the copy that both are made from, ``_views`` the two.
- ``_learn`` runs them on small batches and learns what crosses. ``_same_path`` is the trunk's share
  of that, ``_use`` what an expert does with it, ``_features`` what its classifier reads.
- ``_parts`` is what a model is made of. Hooks of others on it are kept apart by ``_observers``,
  modules that did not run at the build are ``_unseen``, and what somebody puts on a stand-in is
  told by ``_misplaced``.
"""

from ride_plugin._split._cut._features import features_of
from ride_plugin._split._cut._learn import (
    Lesson,
    learn,
    learn_at_run_time,
    throwaway,
    throwaway_expert,
)
from ride_plugin._split._cut._misplaced import (
    has_unrun_hooks,
    is_real,
    keep_stand_ins,
    places_of_stand_ins,
    real_parts,
)
from ride_plugin._split._cut._observers import (
    hooks_of_others,
    is_of_torch,
    is_ours,
    numbers_of_hooks,
    without_later,
)
from ride_plugin._split._cut._parts import (
    Parts,
    Split,
    feature_dim_of,
    parts_of,
    replicate,
    trial_run,
)
from ride_plugin._split._cut._source import after_first_call, refuse_unfit, source_of
from ride_plugin._split._cut._unseen import unseen_modules
from ride_plugin._split._cut._use import place_of, tensor_at
from ride_plugin._split._cut._views import Link, Views, build_views, sides, spine_tensors

__all__ = [
    "Lesson",
    "Link",
    "Parts",
    "Split",
    "Views",
    "after_first_call",
    "build_views",
    "feature_dim_of",
    "features_of",
    "has_unrun_hooks",
    "hooks_of_others",
    "is_of_torch",
    "is_ours",
    "is_real",
    "keep_stand_ins",
    "learn",
    "learn_at_run_time",
    "numbers_of_hooks",
    "parts_of",
    "place_of",
    "places_of_stand_ins",
    "real_parts",
    "refuse_unfit",
    "replicate",
    "sides",
    "source_of",
    "spine_tensors",
    "tensor_at",
    "throwaway",
    "throwaway_expert",
    "trial_run",
    "unseen_modules",
    "without_later",
]
