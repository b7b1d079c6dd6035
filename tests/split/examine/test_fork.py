"""Units of a backbone, and the one at which it forks by default."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from ride_plugin import RIDEWrapper, SplitError, expert_logits
from ride_plugin._split._examine._fork import choose_fork
from ride_plugin._split._examine._probe import Call, call_tree
from ride_plugin._split._examine._units import tokens, units_of
from tests.backbones import CifarResNet, ImageNetResNet, VisionTransformer, mlp


def test_units_are_blocks_and_layers_between_them() -> None:
    root, _ = call_tree(CifarResNet(n=2).eval(), ((torch.rand(2, 3, 32, 32),), {}))
    names = [unit.name for unit in units_of(root)]
    assert names[:5] == ["conv1", "bn1", "relu", "layer1.0", "layer1.1"]
    assert names[-2:] == ["pool", "linear"]
    assert [tokens(unit) for unit in units_of(root)][-3:] == [64, 1, 1]


def test_multiply_adds_of_resnet_32_are_the_known_number() -> None:
    root, _ = call_tree(CifarResNet().eval(), ((torch.rand(1, 3, 32, 32),), {}))
    assert root.multiply_adds == pytest.approx(69.1e6, rel=0.01)  # ResNet paper: 0.69e8


@pytest.mark.parametrize(
    ("backbone", "size", "reason"),
    [
        (CifarResNet(n=1), 32, "last two of 3 resolution levels"),
        (ImageNetResNet(), 64, "last two of 5 resolution levels"),
        (VisionTransformer(), 32, "last third of 6 TransformerEncoderLayer blocks"),
    ],
)
def test_reason_for_the_default_fork(backbone, size: int, reason: str) -> None:
    root, _ = call_tree(backbone.eval(), ((torch.rand(2, 3, size, size),), {}))
    assert choose_fork(root, None).reason == reason


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_a_weight_that_is_computed_is_counted_as_one_that_is_learned(change) -> None:
    def root_of(backbone: nn.Module) -> Call:
        return call_tree(backbone.eval(), ((torch.rand(2, 3, 32, 32),), {}))[0]

    plain, backbone = root_of(CifarResNet(n=1)), CifarResNet(n=1)
    for layer in [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]:
        change(layer)
    root = root_of(backbone)
    assert root.multiply_adds == plain.multiply_adds
    assert [unit.name for unit in units_of(root)] == [unit.name for unit in units_of(plain)]
    assert choose_fork(root, None).index == choose_fork(plain, None).index


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Conv1d(4, 6, 5),
        nn.Linear(7, 6),
    ],
)
def test_multiply_adds_are_half_of_what_torch_counts(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 9) if isinstance(layer, nn.Conv1d) else torch.randn(2, 4, 9, 7)
    root, _ = call_tree(nn.Sequential(layer), ((x,), {}))
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert root.multiply_adds == counter.get_total_flops() // 2


def test_probing_leaves_no_hook_behind() -> None:
    backbone = mlp()
    call_tree(backbone, ((torch.rand(2, 20),), {}))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(x)[0].mean(1))


class AlmostAllEarly(nn.Module):
    """Five large layers of their own kind, then three small blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.ReLU())
        self.blocks = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        self.fc = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x).mean((2, 3))))


@pytest.mark.parametrize(
    ("backbone", "example", "fork_at", "message"),
    [
        (
            Recurrent,
            (2, 5, 8),
            "lstm",
            r"at 'lstm', but no layer with weights.*`fork_at='lstm'` if",
        ),
        (AlmostAllEarly, (2, 3, 16, 16), "blocks.1", r"at 'blocks.1', but 99.8% of the multiply"),
    ],
)
def test_a_fork_that_makes_little_sense_is_warned_of_once_unless_it_was_asked_for(
    backbone, example, fork_at: str, message: str
) -> None:
    x = torch.randn(example)
    with pytest.warns(UserWarning, match=message) as warned:
        model = RIDEWrapper(backbone(), 3, example_input=x)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert model.fork_at == fork_at
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RIDEWrapper(backbone(), 3, fork_at=fork_at, example_input=x)
        RIDEWrapper(backbone(), 1, example_input=x)  # nothing is shared with one
        frozen = backbone().requires_grad_(False)  # a pretrained trunk, and heads on it
        frozen.fc.requires_grad_(True)
        RIDEWrapper(frozen, 3, fork_at="fc", init="copy", example_input=x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(self.inner(x).relu())


class Pair(nn.Module):
    """Two numbered blocks, one behind the other or side by side."""

    def __init__(self, chain: bool) -> None:
        super().__init__()
        self.chain = chain
        for index in range(2):
            self.add_module(str(index), Residual())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.children()
        return second(first(x)) if self.chain else first(x) + second(x)


def test_numbered_blocks_are_units_where_one_runs_behind_the_other() -> None:
    def units(chain: bool) -> list[str]:
        names = ("a", "b", "c")
        stages = nn.Sequential(OrderedDict((name, Pair(chain)) for name in names))
        root, _ = call_tree(stages, ((torch.rand(2, 8),), {}))
        return [unit.name for unit in units_of(root)]

    assert units(chain=True) == ["a.0", "a.1", "b.0", "b.1", "c.0", "c.1"]
    assert units(chain=False) == ["a", "b", "c"]  # no place between them where a batch could wait


def test_a_backbone_without_layers_has_nothing_to_fork() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    with pytest.raises(SplitError, match="no submodule with parameters"):
        RIDEWrapper(Bare(), 2, example_input=torch.rand(2, 6), num_classes=4)


class KernelSizes(nn.Module):
    """Convolutions of three kernel sizes over one text, with or without modules between them."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.sizes = nn.ModuleList([nn.Conv1d(8, 6, k) for k in (2, 3, 4)])
        self.relu = nn.ReLU() if between else torch.relu
        self.fc = nn.Linear(18, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens).transpose(1, 2)
        found = [self.relu(conv(h)).amax(2) for conv in self.sizes]
        logits: Tensor = self.fc(torch.cat(found, 1))
        return logits


class AddsInPlace(nn.Module):
    """Blocks that add to one value, which is not what each of them takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h += block(h)
        logits: Tensor = self.fc(h)
        return logits


class WideAndDeep(AddsInPlace):
    """The last branch takes what the first took, with others between them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks[:1]:
            h = block(h).relu()
        logits: Tensor = self.fc(h + self.wide(x))
        return logits


class AtOnce(AddsInPlace):
    """Nothing to share before the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([nn.Linear(6, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(sum(other(x) for other in self.others))
        return logits


class BesideShared(AddsInPlace):
    """One module runs beside each block, on what the block takes."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = (self.shared(h) + block(h)).relu()
        logits: Tensor = self.fc(h)
        return logits


@pytest.mark.parametrize("between", [False, True])
def test_branches_of_one_value_are_forked_together(between: bool) -> None:
    model = RIDEWrapper(KernelSizes(between), 2, example_input=torch.randint(9, (4, 7)))
    assert model.fork_at == "sizes"
    assert {name.split(".")[0] for name, _ in model.trunk.named_parameters()} == {"embed"}


@pytest.mark.parametrize(
    ("net", "fork_at"),
    [
        (AddsInPlace(), "blocks.4"),
        (WideAndDeep(), "wide"),
        (AtOnce(), "others.2"),
        (BesideShared(), "blocks.4"),
    ],
)
def test_units_that_take_other_values_are_no_branches(net: nn.Module, fork_at: str) -> None:
    root, _ = call_tree(net.eval(), ((torch.rand(2, 6),), {}))
    assert choose_fork(root, None).name == fork_at


class ScoresEachClass(nn.Module):
    """Attends to an input once for each class, and has a layer for the score of each."""

    def __init__(self, num_classes: int = 5, hidden: bool = False) -> None:
        super().__init__()
        self.body, self.attend = nn.Linear(6, 8), nn.Linear(8, num_classes)
        self.scores = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
            if hidden
            else nn.Linear(8, 1)
            for _ in range(num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        seen = self.attend(h).softmax(1).transpose(1, 2) @ h
        return torch.cat([score(seen[:, i]) for i, score in enumerate(self.scores)], dim=1)


@pytest.mark.parametrize("hidden", [False, True])
def test_layers_that_score_one_class_each_are_one_classifier(hidden: bool) -> None:
    x = torch.randn(4, 3, 6)
    model = RIDEWrapper(ScoresEachClass(hidden=hidden), 3, num_classes=5, example_input=x)
    assert model.fork_at == "attend"
    logits = expert_logits(model(x))
    assert (logits[:, 0] != logits[:, 1]).all()


class Unrolled(nn.Module):
    """Runs all of its layers for one view after the other."""

    def __init__(self, views: int) -> None:
        super().__init__()
        self.views = views
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.head(self.layers(x.roll(i, 1))) for i in range(self.views))


@pytest.mark.parametrize("views", [1, 2, 3])
def test_a_forward_that_runs_over_and_over_is_forked_as_one_that_runs_once(views: int) -> None:
    x = torch.randn(4, 8)
    model = RIDEWrapper(Unrolled(views), 2, example_input=x)
    assert model.fork_at == "layers.4"
    experts = expert_logits(model(x))
    for k in range(2):
        torch.testing.assert_close(model.to_module(k)(x), experts[:, k])


class _LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


class _WithImage(nn.Module):
    """Embeds its words by a part of its language model, which runs as a whole later."""

    def __init__(self, size: int, behind: bool = False) -> None:
        super().__init__()
        self.vision, self.lm = nn.Linear(size, 8), _LanguageModel()
        self.score = nn.Linear(8, 5)
        self.behind = behind

    def forward(self, words: Tensor, image: Tensor) -> Tensor:
        x = self.lm.embed(words)
        x = self.lm(torch.cat([self.vision(image).unsqueeze(1), x], dim=1)).mean(1)
        return self.score(self.lm.norm(x) if self.behind else x)


@pytest.mark.parametrize("size", [4, 200])  # with 200 most parameters are outside of `lm`
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("fork_at", [None, "vision", "lm.layers", "lm.layers.1", "score"])
def test_a_part_that_is_called_from_outside_is_a_unit_beside_the_rest(
    size: int, behind: bool, fork_at: str | None
) -> None:
    backbone = _WithImage(size, behind).eval()
    x = (torch.randint(20, (3, 6)), torch.rand(3, size))
    model = RIDEWrapper(backbone, 2, fork_at=fork_at, example_input=x).eval()
    with torch.no_grad():
        logits = expert_logits(model(*x))
        for k in range(2):
            torch.testing.assert_close(logits[:, k], model.to_module(k)(*x))
        some = model.run_trunk(*x).select(torch.tensor([2, 0]))
        torch.testing.assert_close(model.run_expert(1, some)[0], logits[[2, 0], 1])
