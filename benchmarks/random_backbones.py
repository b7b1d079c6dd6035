"""Random small backbones are split, narrowed and routed, and compared with a naive model.

`python -m benchmarks.random_backbones --number 10000` draws that many and prints what went wrong;
`--first 4711 --number 1` repeats one; with `--log FILE` a run that was stopped goes on. The naive
model of an expert is the backbone itself with the layers of trunk and expert put in place of its
own: it knows nothing of forks, rows or replay.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin import (
    ConfidenceRouter,
    RIDEWrapper,
    RoutingInference,
    SplitError,
    WidthError,
    expert_logits,
)

CLASSES = 6


@dataclass
class Prediction:
    """One of the forms in which a backbone may return its logits."""

    loss: Tensor | None
    logits: Tensor


class ConvBlock(nn.Module):
    """Convolution, norm, activation; plain, grouped, depthwise or residual."""

    def __init__(self, width: int, out: int, draw: random.Random) -> None:
        super().__init__()
        groups = draw.choice([1, 1, 2])
        self.stride = draw.choice([1, 1, 2])
        self.conv = nn.Conv2d(width, out, 3, self.stride, 1, groups=groups)
        norms = [nn.BatchNorm2d(out), nn.GroupNorm(2, out), nn.Identity()]
        self.norm = draw.choice([norms[0], norms[0], norms[1], norms[2]])
        self.act = draw.choice([nn.ReLU(inplace=True), nn.ReLU(), nn.GELU()])
        self.residual = draw.random() < 0.4
        project = self.residual and (out != width or self.stride > 1)
        self.shortcut = nn.Conv2d(width, out, 1, self.stride) if project else None
        self.scale = nn.Parameter(torch.rand(out, 1, 1) + 0.5) if draw.random() < 0.2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.scale is not None:
            y = y * self.scale
        if self.residual:
            y = y + (x if self.shortcut is None else self.shortcut(x))
        return self.act(y)


class Attention(nn.Module):
    """Self-attention written by hand or torch's own, with a skip and perhaps a small MLP."""

    def __init__(self, width: int, draw: random.Random) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = 2
        self.own = draw.random() < 0.5
        if self.own:
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        else:
            self.attention = nn.MultiheadAttention(width, self.heads, batch_first=True)
        wide = draw.random() < 0.5
        self.mlp = None
        if wide:
            self.mlp = nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.own:
            batch, length, _ = y.shape
            q, k, v = self.qkv(y).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
            y = self.out(y)
        else:
            y, _ = self.attention(y, y, y, need_weights=False)
        x = x + y
        return x if self.mlp is None else x + self.mlp(x)


class Recurrence(nn.Module):
    """A GRU or an LSTM over the sequence, one direction or two."""

    def __init__(self, width: int, out: int, draw: random.Random) -> None:
        super().__init__()
        both = draw.random() < 0.3
        kind = draw.choice([nn.GRU, nn.LSTM])
        self.cell = kind(width, out // (2 if both else 1), batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(x)
        return torch.tanh(y) if y.shape == x.shape else F.relu(y)


class Mlp(nn.Module):
    """Linear, norm, activation on the last dimension."""

    def __init__(self, width: int, out: int, draw: random.Random) -> None:
        super().__init__()
        self.fc = nn.Linear(width, out)
        self.norm = draw.choice([nn.LayerNorm(out), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.fc(x)))


class RandomBackbone(nn.Module):
    """A stem, blocks with skips and shared modules, pooling, and a classifier."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.kind = draw.choice(["image", "image", "sequence", "tokens", "vector", "frames"])
        self.width = width = draw.choice([8, 12])
        stems: dict[str, Callable[[], nn.Module]] = {
            "image": lambda: nn.Conv2d(3, width, 3, padding=1),
            "frames": lambda: nn.Conv2d(3, width, 3, padding=1),
            "sequence": lambda: nn.Linear(5, width),
            "tokens": lambda: nn.Embedding(20, width),
            "vector": lambda: nn.Linear(7, width),
        }
        self.stem = stems[self.kind]()
        self.positions = nn.Parameter(torch.randn(1, 64, width) * 0.1)
        spatial = self.kind in ("image", "frames")
        self.patches = spatial and draw.random() < 0.3  # positions of the map become a sequence
        self.first = nn.ModuleList()
        if spatial:
            for _ in range(draw.randint(1, 3)):
                out = draw.choice([8, 12, 16])
                self.first.append(ConvBlock(width, out, draw))
                width = out
        self.unite = draw.choice(["mean", "max", "sequence"])  # what becomes of a video's frames
        self.token = nn.Parameter(torch.randn(1, 1, width)) if draw.random() < 0.3 else None
        self.blocks = nn.ModuleList()
        self.skips: list[int | None] = []
        widths = [width]
        for index in range(draw.randint(1, 4)):
            earlier = [i for i, w in enumerate(widths) if w == widths[-1]]
            block = self._block(widths[-1], draw)
            if index and draw.random() < 0.15 and widths[-1] == widths[-2]:
                block = self.blocks[-1]  # the same module twice
            self.blocks.append(block)
            out = widths[-1] if isinstance(block, Attention) else self._out(block)
            self.skips.append(draw.choice(earlier) if draw.random() < 0.4 else None)
            widths.append(out)
        self.concat = draw.random() < 0.25
        features = widths[-1] + (widths[0] if self.concat else 0)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(features, CLASSES)
        self.returns = draw.choice(["tensor", "tensor", "dict", "tuple", "dataclass"])

    def _block(self, width: int, draw: random.Random) -> nn.Module:
        if self._sequential():
            kind = draw.choice(["attention", "recurrence", "mlp"])
            if kind == "attention":
                return Attention(width, draw)
            if kind == "recurrence":
                return Recurrence(width, draw.choice([8, 12, width]), draw)
        return Mlp(width, draw.choice([8, 12, width]), draw)

    def _sequential(self) -> bool:
        frames = self.kind == "frames" and self.unite == "sequence"
        return self.kind in ("sequence", "tokens") or self.patches or frames

    @staticmethod
    def _out(block: nn.Module) -> int:
        if isinstance(block, Recurrence):
            return block.cell.hidden_size * (2 if block.cell.bidirectional else 1)
        assert isinstance(block, Mlp)
        return block.fc.out_features

    def forward(self, x: Tensor) -> Any:
        batch = x.shape[0]
        if self.kind == "frames":
            x = x.flatten(0, 1)
        x = self.stem(x)
        for block in self.first:
            x = block(x)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2) if self.patches else x.mean((2, 3))
            if self.patches and x.shape[-1] == self.positions.shape[-1]:
                x = x + self.positions[:, : x.shape[1]]
        if self.kind == "frames":
            if self.patches:
                x = x.mean(1)
            x = x.view(batch, -1, x.shape[-1])
            if self.unite != "sequence" and not self.patches:
                x = x.mean(1) if self.unite == "mean" else x.amax(1)
        if self.token is not None and x.dim() == 3:
            x = torch.cat([self.token.expand(batch, -1, -1), x], dim=1)
        seen = [x]
        for block, skip in zip(self.blocks, self.skips, strict=True):
            y = block(x)
            if skip is not None and y.shape == seen[skip].shape:
                y = y + seen[skip]
            seen.append(y)
            x = y
        if self.concat:
            x = torch.cat([x, seen[0]], dim=-1)
        if x.dim() == 3:
            x = x[:, 0] if self.token is not None else x.mean(1)
        logits = self.head(self.dropout(x))
        if self.returns == "dict":
            return {"features": x, "logits": logits}
        if self.returns == "dataclass":
            return Prediction(None, logits)
        return (logits, x.shape[0]) if self.returns == "tuple" else logits


def inputs(backbone: RandomBackbone, batch: int, generator: torch.Generator, other: bool) -> Tensor:
    """A batch; with ``other``, of another size, length or number of frames."""
    more = int(other)
    if backbone.kind == "tokens":
        return torch.randint(0, 20, (batch, 5 + more), generator=generator)
    shapes = {
        "image": (3, 8, 8 - 2 * more),
        "frames": (3 + more, 3, 8, 8),
        "sequence": (5 + more, 5),
        "vector": (7,),
    }
    return torch.randn(batch, *shapes[backbone.kind], generator=generator)


def logits_of(output: Any) -> Tensor:
    """The backbone's logits, whichever form it returns them in."""
    if isinstance(output, dict):
        output = output["logits"]
    elif isinstance(output, Prediction):
        output = output.logits
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def naive(backbone: nn.Module, model: RIDEWrapper, index: int) -> nn.Module:
    """The backbone with the layers of the trunk and of one expert in place of its own."""
    plain = copy.deepcopy(backbone).train(model.training)
    trunk, expert = model.trunk, model.experts[index]
    theirs: dict[str, Tensor] = dict(expert.named_parameters(remove_duplicate=False))
    theirs |= dict(expert.named_buffers(remove_duplicate=False))
    for name, module in list(plain.named_modules(remove_duplicate=False)):
        prefix = f"{name}." if name else ""
        whole = isinstance(module, nn.MultiheadAttention) or not any(module.children())
        if whole and type(module).__module__.startswith("torch.nn"):
            layer = expert.get_submodule(name)
            if type(layer).__module__.startswith("ride_plugin._split"):  # stands for the trunk's
                layer = trunk.get_submodule(name)
            layer = copy.deepcopy(layer)
            for part in layer.modules():
                part._forward_hooks.clear()
                part._forward_pre_hooks.clear()
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, layer)
            continue
        if any(key.startswith(prefix) for key in theirs):
            numbers = vars(expert.get_submodule(name)).items()  # fewer heads, if it is narrower
            vars(module).update({k: v for k, v in numbers if type(v) in (int, float)})
        for key in [k for k, p in module.named_parameters(recurse=False) if p is not None]:
            source = theirs.get(prefix + key)
            value = trunk.get_parameter(prefix + key) if source is None else source
            setattr(module, key, nn.Parameter(value.detach().clone()))
    return plain


class Mismatch(AssertionError):
    """The wrapped model differs from the naive one."""


def require(got: Tensor, expected: Tensor, what: str, beside: float = 1.0) -> None:
    """Equal up to rounding, measured against the largest value or what is computed ``beside``."""
    if got.shape != expected.shape:
        raise Mismatch(f"{what}: {tuple(got.shape)} where {tuple(expected.shape)} is right")
    if got.numel():
        with torch.no_grad():
            off, scale = float((got - expected).abs().max()), float(expected.abs().max())
        if not off <= 1e-4 * (beside + scale):
            raise Mismatch(f"{what}: off by {off:.3g}, where the largest value is {scale:.3g}")


def check(seed: int) -> str:
    """Draw a backbone, build it and compare; returns what was built or why it was refused.

    Raises:
        Mismatch: the wrapped model computes something else.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    backbone = RandomBackbone(draw)
    with torch.no_grad():  # statistics and gains as after training
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.get_buffer("running_mean").uniform_(-1, 1)
                module.get_buffer("running_var").uniform_(0.5, 2)
    options: dict[str, Any] = {"num_experts": draw.choice([1, 2, 3])}
    if draw.random() < 0.4:
        options["expert_width"] = draw.choice([0.5, 0.75])
    if draw.random() < 0.2:
        options["classifier"] = "cosine"
    if draw.random() < 0.3:
        options["fork_at"] = f"blocks.{draw.randrange(len(backbone.blocks))}"
    if "expert_width" not in options and draw.random() < 0.3:
        options["init"] = "copy"
    example = inputs(backbone, 2, generator, False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = RIDEWrapper(backbone, example_input=example, **options)
    except (SplitError, WidthError) as error:
        return type(error).__name__
    _compare_outputs(backbone, model.eval(), draw, generator)
    _compare_gradients(backbone, model.train(), inputs(backbone, 4, generator, False))
    return "narrowed" if "expert_width" in options else "built"


def _compare_outputs(
    backbone: RandomBackbone, model: RIDEWrapper, draw: random.Random, generator: torch.Generator
) -> None:
    plains = [naive(backbone, model, k) for k in range(model.num_experts)]
    for batch, other in ((5, False), (draw.choice([1, 3, 8]), True)):
        x = inputs(backbone, batch, generator, other)
        with torch.no_grad():
            expected = torch.stack([logits_of(plain(x)) for plain in plains], dim=1)
            output = model(x)
            require(expert_logits(output), expected, f"experts, batch {batch}")
            require(logits_of(output), expected.mean(1), f"mean, batch {batch}")
            state = model.run_trunk(x)
            for k in draw.sample(range(model.num_experts), model.num_experts):
                rows = torch.tensor(draw.sample(range(batch), draw.randint(1, batch)))
                got, _ = model.run_expert(k, state.select(rows))
                require(got, expected[rows, k], f"expert {k}, rows {rows.tolist()} of {batch}")
        if model.num_experts > 1:
            serve = RoutingInference(model, ConfidenceRouter(), draw.choice([0.2, 0.3, 0.5]))
            logits, used = serve(x, return_routing=True)
            dense, dense_used = serve.dense(x, return_routing=True)
            running = torch.stack([expected[i, :n].mean(0) for i, n in enumerate(used.tolist())])
            require(logits, running, f"routed, batch {batch}, used {used.tolist()}")
            if torch.equal(used, dense_used):  # else a row lies on the threshold up to rounding
                require(dense, running, f"dense, batch {batch}")


def _compare_gradients(backbone: RandomBackbone, model: RIDEWrapper, x: Tensor) -> None:
    plains = [naive(backbone, model, k) for k in range(model.num_experts)]
    expected = torch.stack([logits_of(plain(x)) for plain in plains], dim=1)
    direction = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    got = expert_logits(model(x))
    require(got, expected, "experts in training")
    (expected * direction).sum().backward()
    (got * direction).sum().backward()
    # The gradient of a bias before BatchNorm is zero up to the rounding of much larger ones.
    gradients = [p.grad for plain in plains for p in plain.parameters() if p.grad is not None]
    largest = 1 + len(plains) * max(float(gradient.abs().max()) for gradient in gradients)
    naive_gradients = [dict(plain.named_parameters(remove_duplicate=False)) for plain in plains]
    for part, those in [(model.trunk, naive_gradients)] + [
        (expert, [naive_gradients[k]]) for k, expert in enumerate(model.experts)
    ]:
        shared = {id(p) for p in model.trunk.parameters()} if part is not model.trunk else set()
        for name, parameter in part.named_parameters():
            if id(parameter) in shared:
                continue
            found = [g for each in those if (g := each[name].grad) is not None]
            total = torch.stack(found).sum(0) if found else torch.zeros_like(parameter)
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            require(own, total, f"gradient of {name}", largest)


def main() -> None:
    """Draw, compare, print what went wrong and how many of each kind there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--log", type=Path, help="a line for each backbone; a second run goes on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[int, str] = {}
    if options.log and options.log.exists():
        for line in options.log.read_text().splitlines():
            seed, _, what = line.partition(" ")
            known[int(seed)] = what
    found: Counter[str] = Counter()
    began, drawn = time.monotonic(), 0
    for seed in range(options.first, options.first + options.number):
        if seed not in known:
            try:
                what = check(seed)
            except Exception as error:  # whatever it is, it is a finding
                message = " ".join(str(error).split())[:300]
                what = f"WRONG {type(error).__name__}: {message}"
                print(f"{seed}: {what}", flush=True)
            drawn += 1
            if options.log:
                with options.log.open("a") as log:
                    log.write(f"{seed} {what}\n")
        found[(known.get(seed) or what).partition(":")[0]] += 1
    for what, count in found.most_common():
        print(f"{count:>6} {what}")
    if drawn:
        print(f"{(time.monotonic() - began) / drawn:.2f} s for each of {drawn}")


if __name__ == "__main__":
    main()
