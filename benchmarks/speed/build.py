"""What building costs: time in forwards of two rows, and memory against the backbone's.

Each row is a process of its own, because the peak is that of a process (Linux only). The networks
are those of timm and transformers with random weights, and a transformer of 403 million parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.environment import let_torchvision_import
from benchmarks.speed.networks import Case
from ride_plugin import RIDEWrapper

_CLASSES = 100


def _timm(name: str) -> nn.Module:
    let_torchvision_import()
    import timm

    network: nn.Module = timm.create_model(name, num_classes=_CLASSES)
    return network


def _bert(layers: int, width: int) -> nn.Module:
    let_torchvision_import()
    import transformers

    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=_CLASSES,
    )
    network: nn.Module = transformers.BertForSequenceClassification(config)
    return network


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.out(nn.functional.gelu(self.hidden(self.norm2(x))))


class _Large(nn.Module):
    """A vision transformer of 403 million parameters: 32 blocks of width 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 1024, 16, 16)
        self.blocks = nn.Sequential(*(_Block(1024) for _ in range(32)))
        self.head = nn.Linear(1024, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def _image() -> Any:
    return torch.randn(2, 3, 224, 224)


def _text() -> Any:
    return {
        "input_ids": torch.randint(1, 1000, (2, 64)),
        "attention_mask": torch.ones(2, 64).long(),
    }


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "ResNet-50": (lambda: _timm("resnet50"), _image),
    "ViT-B/16": (lambda: _timm("vit_base_patch16_224"), _image),
    "ConvNeXt-T": (lambda: _timm("convnext_tiny"), _image),
    "BERT, 12 layers": (lambda: _bert(12, 768), _text),
    "BERT, 24 layers": (lambda: _bert(24, 1024), _text),
    "transformer, 403 M": (_Large, _image),
}
FORMS: dict[str, dict[str, Any]] = {
    "1 expert": {"num_experts": 1},
    "3 experts": {"num_experts": 3},
    "3 experts of 3/4 width": {"num_experts": 3, "expert_width": 0.75},
    "1 expert, frozen": {"num_experts": 1, "init": "copy"},
    "3 experts, frozen": {"num_experts": 3, "init": "copy"},
}


def build() -> Case:
    """Time and peak memory of building, each in a process of its own."""

    def rows() -> Iterator[list[Any]]:
        for name in NETWORKS:
            for form in FORMS:
                command = [sys.executable, "-W", "ignore", "-m", __name__, name, form]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    yield [name, form, done.stderr.strip().splitlines()[-1][:200], *["-"] * 4]
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                yield [
                    name,
                    form,
                    f"{found['forwards']:.0f}",
                    f"{found['seconds']:.1f}",
                    f"{found['peak']:.1f}",
                    f"{found['result']:.1f}",
                    f"{found['peak'] - found['result']:.1f}",
                ]

    header = ["network", "built", "forwards of two rows", "seconds"]
    header += ["peak / backbone", "result / backbone", "beyond the result"]
    return "Building", header, rows()


def measure(name: str, form: str) -> dict[str, float]:
    """Build once in this process.

    Returns:
        Processor seconds, also in forwards of two rows, and bytes in units of the backbone's: what
        the process grew by at most, and what parameters and buffers of the result take.
    """
    make, example = NETWORKS[name]
    torch.manual_seed(0)
    backbone, x = make().eval(), example()
    if "frozen" in form:
        backbone.requires_grad_(False)
        last = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)][-1]
        last.requires_grad_(True)
    # What is imported or set up at the first call is no cost of this network.
    RIDEWrapper(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 2, fork_at="2")
    times: list[float] = []

    def run() -> None:
        with torch.no_grad():
            for _ in range(4):
                start = time.process_time()
                backbone(**x) if isinstance(x, dict) else backbone(x)
                times.append(time.process_time() - start)

    run()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.process_time()
    model = RIDEWrapper(backbone, example_input=x, **FORMS[form])
    seconds = time.process_time() - start
    unit, highest = _held(backbone), _status("VmHWM")
    run()  # afterwards too: a shared machine is faster at one time than at another
    return {
        "seconds": seconds,
        "forwards": seconds / median(times[1:]),
        "peak": (highest - before) / unit,
        "result": _held(model) / unit,
    }


def _held(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _status(key: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(*sys.argv[1:])))
