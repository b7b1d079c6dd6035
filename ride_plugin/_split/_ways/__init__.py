"""Other ways in and out of a split backbone.

Parts that somebody wrote as modules (``_join``), experts taken from networks of their own
(``_graft``, and ``_inert``, what in them does nothing yet), and the way back, an expert as a plain
module (``_plain``).
"""

from ride_plugin._split._ways._graft import graft_experts
from ride_plugin._split._ways._inert import inert_parameters
from ride_plugin._split._ways._join import join_parts
from ride_plugin._split._ways._plain import output_of_backbone, plain_modules, plain_views

__all__ = [
    "graft_experts",
    "inert_parameters",
    "join_parts",
    "output_of_backbone",
    "plain_modules",
    "plain_views",
]
