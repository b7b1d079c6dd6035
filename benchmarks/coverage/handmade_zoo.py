"""Hand-written architectures: those of the ordinary test run, long-tail codebases', hard cases."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.coverage import hard_cases, hard_modules, longtail
from benchmarks.coverage.architecture import Architecture
from benchmarks.zoo.models import MODELS

_COMPILED = {"cifar_resnet32_option_a", "drop_path_dict", "keeps_features", "set_network"}


def architectures() -> Iterator[Architecture]:
    """List them."""
    for source, models in (
        ("long-tail codebases", longtail.MODELS),
        ("hand-made", MODELS),
        ("hand-made", hard_cases.MODELS),
        ("hand-made", hard_modules.MODELS),
    ):
        for name, (build, hard) in models.items():
            yield Architecture(name, source, build, hard, name in _COMPILED)
