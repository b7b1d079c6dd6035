"""The quickstart runs from start to end on one seed and one epoch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

METHODS = (
    "plain backbone",
    "RIDE, no diversity term",
    "RIDE, all experts",
    "RIDE, routed",
    "RIDE, routed by confidence",
)


@pytest.mark.parametrize("num_experts", [3, 4])
def test_quickstart_prints_one_table_and_draws_one_plot(tmp_path: Path, num_experts: int) -> None:
    for module in EXAMPLES.glob("*.py"):
        shutil.copy(module, tmp_path)
    quickstart = tmp_path / "quickstart.py"
    text = quickstart.read_text(encoding="utf-8")
    assert text.count("num_experts=3") == 1
    quickstart.write_text(text.replace("num_experts=3", f"num_experts={num_experts}"), "utf-8")
    result = subprocess.run(
        [sys.executable, quickstart, "--seeds", "1", "--epochs", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "seed 1 of 1: 100%" in result.stderr

    rows = [line.strip("| ").split("|") for line in result.stdout.splitlines() if line[:1] == "|"]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}
    assert tuple(cells) == METHODS
    for name, (*accuracies, _, _, relative, used) in cells.items():
        for accuracy in accuracies:
            value, deviation = map(float, accuracy.split(" +- "))
            assert 0 <= value <= 100
            assert deviation == 0  # a single seed has none
        shares = [int(share) for share in re.findall(r"(\d+) %", used)]
        assert len(shares) == (num_experts if "routed" in name else 0)
        assert not shares or 98 <= sum(shares) <= 102  # each is rounded
        assert float(relative) > 0
    assert cells["plain backbone"][-2] == "1.00"
    assert float(cells["RIDE, routed"][-2]) < float(cells["RIDE, all experts"][-2])
    assert "Too short to judge: 2 epochs and 1 seeds" in result.stdout
    assert (tmp_path / "quickstart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
