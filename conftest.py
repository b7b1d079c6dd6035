"""Runs every Python block of the README and of docs/ as a test (docstrings run as doctests).

The blocks of a page share a namespace, and nothing is put into it: a page works as it is pasted,
from the top. Only the seed is fixed, so that a run can be repeated.

What an old torch cannot do is skipped: tests by their marks, pages and docstrings by their names.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from ride_plugin._compiler import COMPILES_FROM, EXPORTS_FROM

collect_ignore = ["docs/_site"]  # runs where the site is built

torch.set_num_threads(1)  # the suite's tensors are small; threads only fight over the cores


FROM_TORCH = {"compiles": COMPILES_FROM, "exports": EXPORTS_FROM, "fsdp2": (2, 6)}
PAGES = {"deployment.md": "exports", "fsdp2.md": "fsdp2"}
DOCTESTS = {"export_stages": "exports", "fuse_stages": "exports", "quantize_stages": "exports"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a newer torch, and say which."""
    for item in items:
        needs = {need for need in FROM_TORCH if item.get_closest_marker(need)}
        if item.path.suffix == ".md":
            needs.add(PAGES.get(item.path.name))
        elif item.name.startswith("ride_plugin."):
            needs.add(DOCTESTS.get(item.name.rpartition(".")[2]))
        for need in needs - {None}:
            if torch.__version__ < FROM_TORCH[need]:
                major, minor = FROM_TORCH[need]
                reason = f"needs torch {major}.{minor}, but this is {torch.__version__}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """What is compiled eight times in one process is compiled no more, only what it calls."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/**/*.md"],
    setup=lambda namespace: torch.manual_seed(0),
).pytest()
