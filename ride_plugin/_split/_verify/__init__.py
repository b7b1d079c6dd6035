"""The self-check of every build, and what cannot be cut where somebody wants it: refused by name.

- ``_check`` runs an expert beside the backbone, whose own results are ``_results``, and
  ``_check_rows`` some rows of a batch beside all.
- Refused are a trunk that depends on an expert (``_feedback``), tensors out of sight (``_hidden``),
  what a method leaves that runs once (``_once``), what ``train()`` does in other parts
  (``_modes``), and what code after the fork sets on the trunk's modules (``_set_behind``); on a
  call unlike the example, what experts write where all of them read it (``_written_together``).
- ``_kept_rows`` is what experts keep of each row, which routing would mix.
"""

from ride_plugin._split._verify._check import WrittenBehind, check
from ride_plugin._split._verify._feedback import read_ahead, refuse_feedback, refuse_reading_ahead
from ride_plugin._split._verify._kept_rows import KeptRows, kept_rows, kept_rows_of
from ride_plugin._split._verify._modes import written_by_modes
from ride_plugin._split._verify._results import other_places
from ride_plugin._split._verify._written_together import written_together

__all__ = [
    "KeptRows",
    "WrittenBehind",
    "check",
    "kept_rows",
    "kept_rows_of",
    "other_places",
    "read_ahead",
    "refuse_feedback",
    "refuse_reading_ahead",
    "written_by_modes",
    "written_together",
]
