"""Runs every Python block of the README and of docs/ as a test (docstrings run as doctests)."""

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

torch.set_num_threads(1)  # the suite's tensors are small; threads only fight over the cores


def _namespace(namespace: dict[str, object]) -> None:
    torch.manual_seed(0)
    namespace["torch"] = torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_namespace,
).pytest()
