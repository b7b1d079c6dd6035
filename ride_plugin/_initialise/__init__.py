"""The weights that experts start with: fresh draws, what is kept, and what users are told of it.

- ``_experts`` gives an expert, or its classifier, fresh weights; ``_draw`` is how one tensor is
  drawn anew, and ``_structure`` tells values that have their places.
- What follows a weight that was drawn: buffers beside computed weights (``_computed``), and copies
  of weights (``_followers``).
- What is kept and told of: biases that somebody set (``_set_biases``), traces of training
  (``_trained``), and frozen parameters (``_unlearned``).
"""

from ride_plugin._initialise._computed import settle_computed
from ride_plugin._initialise._draw import (
    constant_rows,
    has_orthogonal_rows,
    is_constant,
    is_sparse,
    redraw,
    shuffled_to,
)
from ride_plugin._initialise._experts import break_tie, reinitialise, renew_classifier
from ride_plugin._initialise._followers import follow, followers_in
from ride_plugin._initialise._set_biases import set_biases
from ride_plugin._initialise._structure import is_structured
from ride_plugin._initialise._trained import warn_if_trained
from ride_plugin._initialise._unlearned import frozen_in, warn_if_all_frozen, warn_if_frozen

__all__ = [
    "break_tie",
    "constant_rows",
    "follow",
    "followers_in",
    "frozen_in",
    "has_orthogonal_rows",
    "is_constant",
    "is_sparse",
    "is_structured",
    "redraw",
    "reinitialise",
    "renew_classifier",
    "set_biases",
    "settle_computed",
    "shuffled_to",
    "warn_if_all_frozen",
    "warn_if_frozen",
    "warn_if_trained",
]
