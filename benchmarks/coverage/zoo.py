"""The whole zoo."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.coverage import handmade_zoo, timm_zoo, torchvision_zoo, transformers_zoo
from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.environment import let_torchvision_import


def zoo() -> list[Architecture]:
    """Every architecture, hand-written ones first; the libraries are imported once for all."""
    let_torchvision_import()
    found = list(handmade_zoo.architectures())
    for library, module in (
        ("transformers", transformers_zoo),
        ("torchvision", torchvision_zoo),
        ("timm", timm_zoo),
    ):
        if find_spec(library) is None:
            raise SystemExit(
                f"The coverage table needs {library}; docs/evidence/coverage.md says how."
            )
        __import__(library)
        found += module.architectures()
    return found
