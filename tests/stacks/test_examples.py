"""Every script of examples/stacks/ trains; those whose stack is not installed are skipped."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

from ride_plugin import RIDELoss

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "stacks"

NEEDS = {
    "plain_loop": (),
    "torchrun_ddp": (),
    "torchrun_fsdp2": (),
    "trainer_images": ("transformers", "accelerate"),
    "trainer_text": ("transformers", "accelerate"),
    "with_accelerate": ("accelerate",),
    "with_lightning": ("lightning",),
    "with_timm": ("timm",),
    "with_torchmetrics": ("torchmetrics",),
}
AT_MOST = {
    "trainer_images": 3,
    "trainer_text": 3,
    "with_timm": 3,
    "torchrun_fsdp2": 5,
    "with_torchmetrics": 3,
}

# torchvision's build for accelerators imports beside a CPU torch once two operators are declared.
_LAUNCH = """
import runpy, sys
sys.path.append({root!r})
from benchmarks.coverage.environment import let_torchvision_import
let_torchvision_import()
sys.argv = [{script!r}]
sys.path.insert(0, {folder!r})
runpy.run_path({script!r}, run_name="__main__")
"""


def missing(*packages: str) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def test_every_script_is_listed() -> None:
    assert set(NEEDS) == {p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_")}


@pytest.mark.parametrize("name", NEEDS)
def test_few_lines_differ_from_a_plain_training(name: str) -> None:
    marked = re.findall(r"# RIDE$", (FOLDER / f"{name}.py").read_text(), flags=re.MULTILINE)
    assert 3 <= len(marked) <= AT_MOST.get(name, 4)


def test_scripts_that_end_no_epoch_lose_nothing() -> None:
    """Without ``start_epoch`` the loss is the same in every epoch: ``step()`` may be left out."""
    criterion = RIDELoss(nn.CrossEntropyLoss(), [90, 9, 1])
    logits, targets = torch.randn(4, 3, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    first = criterion(logits, targets)
    criterion.step()
    assert torch.equal(criterion(logits, targets), first)
    for name in NEEDS:
        assert "start_epoch" not in (FOLDER / f"{name}.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_trains_beyond_chance(name: str) -> None:
    if name == "torchrun_fsdp2" and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("torch has FSDP2 from 2.6 on")
    absent = missing(*NEEDS[name], "sklearn")
    if absent:
        pytest.skip(f"not installed: {absent}")
    script = str(FOLDER / f"{name}.py")
    if name.startswith("torchrun"):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    else:
        launch = _LAUNCH.format(root=str(ROOT), folder=str(FOLDER), script=script)
        command = ["-c", launch]
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    accuracy = re.findall(r"^([\d.]+) %$", result.stdout, flags=re.MULTILINE)[-1]
    chance = 25 if name == "trainer_text" else 10  # per cent
    assert float(accuracy) > chance + 15
