"""Runs every Python block of the README and of docs/ as a test (docstrings run as doctests).

The blocks of a page share a namespace, and nothing is put into it: a page works as it is pasted,
from the top. Only the seed is fixed, so that a run can be repeated.
"""

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

collect_ignore = ["docs/_site"]  # runs where the site is built

torch.set_num_threads(1)  # the suite's tensors are small; threads only fight over the cores


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/**/*.md"],
    setup=lambda namespace: torch.manual_seed(0),
).pytest()
