"""Loading, saving and moving: states of a wrapped model, and what a backbone's class does to them.

``_holder`` is the module that loads, saves and moves. Tensors that were frozen when a model was
wrapped exist once (``_frozen``). Loaders of the backbone's own get what the other side holds
(``_lend``), states that cannot fit are refused (``_plain_state``), and what the backbone's class
overrides in vain is told (``_passed_by``). ``_pair`` makes a backbone of a feature extractor and a
classifier, which have names of their own in a state.
"""

from ride_plugin._split._saving._frozen import Frozen
from ride_plugin._split._saving._holder import Holder
from ride_plugin._split._saving._lend import refuse_unsavable
from ride_plugin._split._saving._pair import Pair
from ride_plugin._split._saving._passed_by import tell_of_hidden_parameters
from ride_plugin._split._saving._plain_state import (
    is_same,
    refuse_plain_state,
    refuse_state_of_part,
)

__all__ = [
    "Frozen",
    "Holder",
    "Pair",
    "is_same",
    "refuse_plain_state",
    "refuse_state_of_part",
    "refuse_unsavable",
    "tell_of_hidden_parameters",
]
