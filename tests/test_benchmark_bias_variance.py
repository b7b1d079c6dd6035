"""The bias and variance benchmark runs from start to end and prints shares that add up."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[1]


def test_it_prints_bias_variance_and_error_of_every_method() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.bias_variance", "--models", "2", "--epochs", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]
    shares = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert len(shares) == 9
    for method in ("plain backbone", "RIDE, no diversity term", "RIDE"):
        kinds = (shares[f"{method}, {kind}"] for kind in ("bias", "variance", "error"))
        for bias, variance, error in zip(*kinds, strict=True):
            assert 0 <= bias <= 100
            assert 0 <= variance <= 50.1  # of two models at most one departs from what is said
            assert bias - variance - 0.1 <= error <= bias + variance + 0.1
