"""How experts become narrower: an expert runs, and its layers are resized on the way.

- ``_narrow`` leads: trial forwards of a copy until one fits, then the same to the expert itself.
- A trial (``_trial``, run by ``_runs``) follows a plan (``_plan``) and one map of widths
  (``_map``), and notes what it changes (``_ledger``). Where two widths have to be equal, ``_amend``
  changes the plan; ``_comparison`` and ``_choices`` refuse what fits by luck.
- What is known of layers: ``_layers``, ``_recurrent``, ``_attention``, ``_norms``, ``_kernels``;
  modules of fixed sizes (``_fixed``), tables (``_tables``) and factors (``_scales``) that a
  constructor computed.
"""

from ride_plugin._width._narrow import narrow_expert

__all__ = ["narrow_expert"]
