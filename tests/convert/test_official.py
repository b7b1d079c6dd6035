"""The authors' checkpoints: equal numbers, nothing of the file executed, every misfit named."""

from __future__ import annotations

import copy
import functools
import os
import pathlib
import pickle
import random
import re
import sys
import time
import types
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.resnets import CifarResNet
from ride_plugin import (
    ArgumentError,
    CheckpointError,
    ExpertRouter,
    RIDEWrapper,
    RoutingInference,
    count_flops,
    load_official_checkpoint,
)
from tests.handmade import resnet32_ride
from tests.official import Official, Plain
from tests.reference import REFERENCE, SHARED, resnet32_arrays


@functools.cache
def built(num_experts: int, width: float, num_classes: int) -> RIDEWrapper:
    backbone = CifarResNet(num_classes)
    return RIDEWrapper(backbone, num_experts, expert_width=width, classifier="cosine").eval()


def cifar_model(num_experts: int = 3, width: float = 0.75, num_classes: int = 100) -> RIDEWrapper:
    return copy.deepcopy(built(num_experts, width, num_classes))


def cifar_state(num_experts: int = 3, num_classes: int = 100) -> dict[str, Tensor]:
    """The authors' names for the hand-made network's tensors."""
    model, router = resnet32_ride(num_experts=num_experts, num_classes=num_classes)
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^experts\.(\d)\.(layer\d|linear)\.", r"\2s.\1.", name)
        state["backbone." + name.removeprefix("trunk.")] = tensor
    for name, tensor in router.state_dict().items():
        name = name.replace("hidden.", "hidden_fcs.").replace("output.", "fc.")
        state["backbone.expert_help_pred_" + name] = tensor
    return state


def test_images(count: int) -> Tensor:
    with np.load(SHARED / "data" / "cifar100_lt.npz") as archive:
        images = torch.from_numpy(archive["test_images"][:count])
    mean = torch.tensor((0.4914, 0.4822, 0.4465))[:, None, None]
    deviation = torch.tensor((0.2023, 0.1994, 0.2010))[:, None, None]
    return (images.permute(0, 3, 1, 2) / 255 - mean) / deviation


test_images.__test__ = False


@pytest.mark.reference
def test_a_network_that_the_authors_code_trained_gives_its_own_outputs() -> None:
    model = cifar_model()
    router = ExpertRouter.for_model(model, inputs="paper")
    found = load_official_checkpoint(model, router, REFERENCE / "official_ride_ea.pth")
    assert (found.num_experts, found.num_classes, found.fork_at) == (3, 100, "layer2")
    assert (found.cosine, found.has_router, found.router_loaded) == (True, True, True)
    x = test_images(200)  # all 10,000 agree as well; that takes minutes on a small machine
    with np.load(REFERENCE / "official_ride_ea_outputs.npz") as archive:
        expected = {key: torch.from_numpy(archive[key]) for key in archive.files}
    logits = model(x).detach()
    routed, used = RoutingInference(model, router)(x, return_routing=True)
    assert torch.equal(logits.argmax(1), expected["all_argmax"][:200])
    assert torch.equal(routed.argmax(1), expected["routed_argmax"][:200])
    assert torch.equal(used, expected["experts_used"][:200])
    assert len(used.unique()) > 1
    first = expected["all_logits_first64"], expected["routed_logits_first64"]
    torch.testing.assert_close(logits[:64], first[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(routed[:64], first[1], rtol=0, atol=1e-4)


@pytest.mark.reference
def test_their_random_network_gives_its_own_outputs() -> None:
    arrays, state = resnet32_arrays()
    model = cifar_model()
    router = ExpertRouter.for_model(model, inputs="paper")
    load_official_checkpoint(model, router, state)
    inputs = model.router_inputs(arrays["x"])
    tolerance = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(inputs.expert_logits, arrays["expert_logits"], **tolerance)
    torch.testing.assert_close(inputs.expert_features, arrays["expert_features"], **tolerance)
    routed, used = RoutingInference(model, router)(arrays["x"], return_routing=True)
    torch.testing.assert_close(routed, arrays["routed_logits"], **tolerance)
    assert torch.equal(used, arrays["experts_used"])


LAYOUTS = {
    "ResNet-10": ("basic", (1, 1, 1, 1), 3, {}),
    "ResNet-10, cosine, 2 experts": ("basic", (1, 1, 1, 1), 2, {"use_norm": True}),
    "ResNet-10, full width": ("basic", (1, 1, 1, 1), 2, {"widths": (256, 512)}),
    "ResNet-50": ("deep", (3, 4, 6, 3), 2, {}),
    "ResNeXt-50": ("next", (3, 4, 6, 3), 2, {"top_k": 20}),
    # the shapes of ResNet-50 and ResNeXt-50 with one block for each stage
    "bottlenecks, layer3 shared": (
        "deep", (1, 1, 1, 1), 2, {"share_layer3": True, "widths": (256, 384), "use_norm": True}
    ),
    "bottlenecks, layer3 shared, full width": (
        "deep", (1, 1, 1, 1), 2, {"share_layer3": True, "widths": (256, 512)}
    ),
    "grouped bottlenecks, 6 experts": ("next", (1, 1, 1, 1), 6, {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts_of_their_imagenet_layouts_give_the_outputs_of_a_forward_by_hand(
    layout: str,
) -> None:
    kind, depths, num_experts, options = LAYOUTS[layout]
    official = Official(kind, depths, 40, num_experts, **options).eval()
    shared = "share_layer3" in options
    model = RIDEWrapper(
        Plain(kind, depths, 40),
        num_experts,
        fork_at="layer4" if shared else None,
        expert_width=options.get("widths", (192, 384))[1] / 512,
        classifier="cosine" if "use_norm" in options else None,
        example_input=torch.randn(2, 3, 32, 32),
    ).eval()
    router = ExpertRouter.for_model(model, inputs="paper", top_k=options.get("top_k", 30))
    state = {f"module.backbone.{key}": tensor for key, tensor in official.state_dict().items()}
    found = load_official_checkpoint(model, router, {"state_dict": state})
    assert found.fork_at == model.fork_at == ("layer4" if shared else "layer3")
    assert found.cosine == ("use_norm" in options)
    assert found.num_parameters == sum(tensor.numel() for tensor in state.values())
    x = torch.randn(3, 3, 32, 32)
    inputs = model.router_inputs(x)
    with torch.no_grad():
        torch.testing.assert_close(inputs.expert_logits, official(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(router(inputs), official.gates(x), rtol=1e-4, atol=1e-4)
    assert count_flops(model, x) == count_flops(official, x)


@pytest.mark.parametrize("num_experts", [2, 6])
def test_any_number_of_experts_loads_and_the_router_may_stay_in_the_file(num_experts: int) -> None:
    state = cifar_state(num_experts)
    model = cifar_model(num_experts)
    found = load_official_checkpoint(model, None, state)
    assert (found.num_experts, found.has_router, found.router_loaded) == (num_experts, True, False)
    last = num_experts - 1
    theirs = state[f"backbone.linears.{last}.weight"]
    assert torch.equal(model.classifiers[last].weight, theirs.T)


def test_values_that_a_model_in_half_precision_cannot_hold_are_refused() -> None:
    state = cifar_state(2)
    name = "backbone.layer2s.1.0.bn1.running_var"
    state[name][3] = 1e5
    model = cifar_model(2).half()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = r"too large for torch.float16: experts.1.layer2.0.bn1.running_var, up to 100000 \("
    with pytest.raises(CheckpointError, match=message):
        load_official_checkpoint(model, None, state)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    load_official_checkpoint(model.bfloat16(), None, state)


def test_half_precision_files_load_exactly() -> None:
    state = {key: t.half() if t.is_floating_point() else t for key, t in cifar_state(2).items()}
    model = cifar_model(2)
    load_official_checkpoint(model, None, state)
    assert model.trunk.conv1.weight.dtype == torch.float32
    assert torch.equal(model.trunk.conv1.weight, state["backbone.conv1.weight"].float())


def official_file(path: pathlib.Path, state: dict[str, Tensor], legacy: bool) -> pathlib.Path:
    """As their trainer saves it: a configuration object and paths beside the tensors."""
    module = types.ModuleType("parse_config")
    module.ConfigParser = type("ConfigParser", (), {"__module__": "parse_config"})
    config = module.ConfigParser()
    config._config = OrderedDict(arch={"type": "ResNet32EAModel"})
    config._save_dir = pathlib.PurePosixPath("saved/models")
    sys.modules["parse_config"] = module
    try:
        content = {"arch": "EAModel", "state_dict": state, "config": config, "epoch": 3,
                   "monitor_best": np.float64(0.5)}  # fmt: skip
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules["parse_config"]
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_a_configuration_object_in_the_file_is_read_as_an_empty_shell(
    tmp_path: pathlib.Path, legacy: bool
) -> None:
    state = cifar_state(2)
    path = official_file(tmp_path / "model_best.pth", state, legacy)
    with pytest.raises(pickle.UnpicklingError, match=r"parse_config\.ConfigParser"):
        torch.load(path, weights_only=True)
    model = cifar_model(2)
    load_official_checkpoint(model, ExpertRouter.for_model(model, inputs="paper"), path)
    assert torch.equal(model.trunk.conv1.weight, state["backbone.conv1.weight"])
    with pytest.raises(pickle.UnpicklingError):  # and the shell does not stay behind
        torch.load(path, weights_only=True)


class Malicious:
    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> object:
        return self.call


EXECUTED: list[str] = []


def executes(text: str) -> str:
    EXECUTED.append(text)
    return text


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_does_not_run(tmp_path: pathlib.Path, legacy: bool) -> None:
    state = cifar_state(2)
    path = tmp_path / "malicious.pth"
    content = {"config": Malicious(executes, "ran"), "state_dict": state}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    EXECUTED.clear()
    torch.load(path, weights_only=False)
    assert EXECUTED == ["ran"]  # the attack is real
    EXECUTED.clear()
    model = cifar_model(2)
    load_official_checkpoint(model, None, path)
    assert EXECUTED == []
    assert torch.equal(model.trunk.conv1.weight, state["backbone.conv1.weight"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "command", "name"),
    [
        (os.system, "touch {}", r"posix\.system"),
        (eval, "open({!r}, 'w')", r"__builtin__\.eval"),
        (exec, "open({!r}, 'w')", r"__builtin__\.exec"),
    ],
)
def test_a_file_that_calls_the_system_is_refused_by_name(
    tmp_path: pathlib.Path, function, command: str, name: str, legacy: bool
) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "malicious.pth"
    attack = Malicious(function, command.format(str(trace)))
    content = {"config": attack, "state_dict": cifar_state(2)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=rf"{name}.*torch\.save\("):
        load_official_checkpoint(cifar_model(2), None, path)
    assert not trace.exists()


def test_weights_that_are_themselves_shells_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "odd.pth"
    torch.save({"state_dict": {"linears.0.weight": Malicious(executes, "x")}}, path)
    EXECUTED.clear()
    with pytest.raises(CheckpointError, match=r"tensors only, but 'linears\.0\.weight'"):
        load_official_checkpoint(cifar_model(2), None, path)
    assert EXECUTED == []


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_official_checkpoint(cifar_model(2), None, path)


def before(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cifar_model(2), "holds 3 experts, the model has 2: pass num_experts=3"),
        (lambda: cifar_model(3, 1.0), r"48 features, the model of 64: pass expert_width=0\.75"),
        (lambda: cifar_model(3, 0.75, 10), "100 classes, the model 10"),
        (
            lambda: RIDEWrapper(CifarResNet(100), 3, expert_width=0.75),
            "cosine classifiers .* pass classifier='cosine'",
        ),
        (
            lambda: RIDEWrapper(
                CifarResNet(100), 3, fork_at="layer3", expert_width=0.75, classifier="cosine"
            ),
            "begin at layer2, the model forks at layer3: pass fork_at='layer2'",
        ),
    ],
)
def test_a_model_built_to_other_measures_is_told_what_to_pass(build, message: str) -> None:
    model = build()
    kept = before(model)
    with pytest.raises(CheckpointError, match=message):
        load_official_checkpoint(model, None, cifar_state())
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_linear_classifiers_do_not_go_into_cosine_ones() -> None:
    state = cifar_state(2)
    for k in range(2):
        key = f"backbone.linears.{k}"
        state[f"{key}.weight"] = state[f"{key}.weight"].T
        state[f"{key}.bias"] = torch.zeros(100)
    with pytest.raises(CheckpointError, match="pass classifier=None"):
        load_official_checkpoint(cifar_model(2), None, state)
    model = RIDEWrapper(CifarResNet(100), 2, expert_width=0.75)
    assert not load_official_checkpoint(model, None, state).cosine
    assert torch.equal(model.classifiers[1].weight, state["backbone.linears.1.weight"])


def test_every_key_that_does_not_fit_is_named_and_nothing_is_loaded() -> None:
    state = cifar_state()
    del state["backbone.layer3s.1.4.bn2.weight"]
    state["backbone.bn1.bias"] = torch.zeros(7)
    state["backbone.layer2s.2.0.extra"] = torch.zeros(3)
    del state["backbone.expert_help_pred_hidden_fcs.1.bias"]
    model = cifar_model()
    router = ExpertRouter.for_model(model, inputs="paper")
    kept, kept_router = before(model), before(router)
    with pytest.raises(CheckpointError) as caught:
        load_official_checkpoint(model, router, state)
    for line in (
        "missing in the file: experts.1.layer3.4.bn2.weight [48]",
        "other shape: trunk.bn1.bias [7] -> [16] (their bn1.bias)",
        "unexpected in the file: layer2s.2.0.extra [3]",
        "missing in the file: hidden.1.bias [16]",
    ):
        assert line in str(caught.value)
    assert str(caught.value).count("\n") == 5
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    now = router.state_dict()
    assert all(torch.equal(kept_router[name], tensor) for name, tensor in now.items())


def test_routers_that_do_not_fit_are_told_apart() -> None:
    model = cifar_model(2)
    state = cifar_state(2)
    with pytest.raises(CheckpointError, match=r"top 30 logits, .* reads 50: .*top_k=30"):
        load_official_checkpoint(
            model, ExpertRouter.for_model(model, inputs="paper", top_k=50), state
        )
    each = {key.replace("pred_fc.", "pred_fcs.0."): tensor for key, tensor in state.items()}
    with pytest.raises(CheckpointError, match="output layer for each gate"):
        load_official_checkpoint(model, ExpertRouter.for_model(model, inputs="paper"), each)
    alone = {key: tensor for key, tensor in state.items() if "expert_help" not in key}
    assert not load_official_checkpoint(model, None, alone).has_router
    with pytest.raises(CheckpointError, match="from stage one"):
        load_official_checkpoint(model, ExpertRouter.for_model(model, inputs="paper"), alone)


def test_what_is_no_ride_checkpoint_is_refused() -> None:
    model = cifar_model(2)
    with pytest.raises(CheckpointError, match="before wrapping it"):
        load_official_checkpoint(model, None, CifarResNet(100).state_dict())
    with pytest.raises(CheckpointError, match="state dict"):
        load_official_checkpoint(model, None, {"state_dict": None})
    twice = {**cifar_state(2), "bn1.weight": torch.ones(16)}
    with pytest.raises(CheckpointError, match=r"`bn1\.weight` twice"):
        load_official_checkpoint(model, None, twice)
    with pytest.raises(ArgumentError, match="RIDEWrapper"):
        load_official_checkpoint(nn.DataParallel(model), None, cifar_state(2))


def small_model(**options: object) -> RIDEWrapper:
    layers = {"conv1": nn.Linear(8, 16), "layer2": nn.Linear(16, 16), "fc": nn.Linear(16, 5)}
    return RIDEWrapper(nn.Sequential(OrderedDict(layers)), 2, fork_at="layer2", **options)


def small_state() -> dict[str, Tensor]:
    state = {"conv1.weight": torch.randn(16, 8), "conv1.bias": torch.randn(16)}
    for k in range(2):
        state |= {f"layer2s.{k}.weight": torch.randn(16, 16), f"layer2s.{k}.bias": torch.randn(16)}
        state |= {f"linears.{k}.weight": torch.randn(5, 16), f"linears.{k}.bias": torch.randn(5)}
    return state


def require_unchanged(model: nn.Module, kept: dict[str, Tensor]) -> None:
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


NO_WEIGHTS = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "integer": lambda t: t.to(torch.int8),
    "NaN": lambda t: t.index_fill(0, torch.tensor([1]), torch.nan),
    "infinity": lambda t: t.index_fill(0, torch.tensor([1]), torch.inf),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "subclass": lambda t: t.as_subclass(Marked),
}


class Marked(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_tensors_of_the_right_shape_that_are_no_weights_change_nothing(kind: str) -> None:
    state, model = small_state(), small_model()
    last = list(state)[-2]  # everything before it fits
    state[last] = NO_WEIGHTS[kind](state[last])
    kept = before(model)
    with pytest.raises(CheckpointError, match=r"linears\.1\.weight|experts\.1\.fc\.weight"):
        load_official_checkpoint(model, None, state)
    require_unchanged(model, kept)


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"on the meta device in the model: .*to_empty"):
        load_official_checkpoint(small_model().to("meta"), None, small_state())


def test_experts_that_share_a_tensor_do_not_take_two() -> None:
    state, model = small_state(), small_model()
    model.experts[1].layer2.weight = model.experts[0].layer2.weight  # as frozen layers are
    kept = before(model)
    with pytest.raises(CheckpointError, match=r"one tensor in the model, two in the file.*layer2"):
        load_official_checkpoint(model, None, state)
    require_unchanged(model, kept)
    state["layer2s.1.weight"] = state["layer2s.0.weight"].clone()
    load_official_checkpoint(model, None, state)
    assert torch.equal(model.experts[1].layer2.weight, state["layer2s.1.weight"])


def test_a_pickle_of_protocol_4_is_told_how_to_be_kept(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "protocol.pth"
    torch.save({"state_dict": small_state()}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"in pickle protocol 4,.*torch\.save\("):
        load_official_checkpoint(small_model(), None, path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_is_cut_off_anywhere_is_said_to_be_damaged(
    tmp_path: pathlib.Path, legacy: bool
) -> None:
    path = official_file(tmp_path / "whole.pth", small_state(), legacy)
    whole, model = path.read_bytes(), small_model()
    load_official_checkpoint(model, None, path)
    kept = before(model)
    for share in range(1, 40):
        path.write_bytes(whole[: len(whole) * share // 40])
        with pytest.raises(CheckpointError, match="damaged, cut off or no checkpoint"):
            load_official_checkpoint(model, None, path)
    require_unchanged(model, kept)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: pathlib.Path) -> None:
    state, path = small_state(), tmp_path / "flipped.pth"
    whole = official_file(path, state, legacy=False).read_bytes()
    model, generator = small_model(), random.Random(0)
    load_official_checkpoint(model, None, path)
    kept, found = before(model), 0
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            load_official_checkpoint(model, None, path)
        except CheckpointError:
            found += 1
        require_unchanged(model, kept)
    assert found > 50  # the others are in padding, dates and repeated headers


@pytest.mark.parametrize("overlapping", [False, True])
def test_an_archive_that_inflates_is_refused_before_it_is_unpacked(
    tmp_path: pathlib.Path, overlapping: bool
) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED if overlapping else 8) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/data/0", bytes(10**6 if overlapping else 10**8))
        if overlapping:  # a thousand members that are one and the same
            for k in range(1, 1000):
                again = copy.copy(archive.infolist()[1])
                again.filename = f"archive/data/{k}"
                archive.filelist.append(again)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="more bytes than the file has"):
        load_official_checkpoint(small_model(), None, path)
    assert path.stat().st_size < 3 * 10**6
    assert time.monotonic() - began < 5


def test_a_router_that_reads_something_else_is_told_what_to_pass() -> None:
    model = cifar_model(2)
    with pytest.raises(CheckpointError, match=r"for_model\(model, inputs='paper'\)"):
        load_official_checkpoint(model, ExpertRouter.for_model(model), cifar_state(2))


def test_a_model_without_a_classifier_of_its_own_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.layer2 = nn.Linear(8, 16), nn.Linear(16, 16)
            self.head = nn.Parameter(torch.randn(16, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer2(self.conv1(x)) @ self.head

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = RIDEWrapper(Bare(), 2, fork_at="layer2", example_input=torch.rand(2, 8))
    with pytest.raises(CheckpointError, match="logits come from a linear layer"):
        load_official_checkpoint(model, None, small_state())
