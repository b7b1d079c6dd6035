"""What a wrapped model answers for its backbone, and what it refuses to."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ArgumentError, RIDEWrapper, expert_logits
from tests.naive import copies_of


class Backbone(nn.Module):
    """Has what timm's and Hugging Face's models have."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=5)
        self.default_cfg = {"input_size": (8,), "mean": (0.5,)}
        self.token = nn.Parameter(torch.zeros(8))
        self.stem, self._act = nn.Linear(8, 16), nn.ReLU()
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 5)
        self.pieces = self._pieces = [self.stem]
        self._names = ["stem"]
        self.loaded = 0

    @property
    def device(self) -> torch.device:
        return self.token.device

    def no_weight_decay(self) -> set[str]:
        return {"token", "scale", "stem.bias"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^token|stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^head", (99,))]}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(16, num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        raise AssertionError("must not be called")

    gradient_checkpointing_enable = gradient_checkpointing_disable = set_grad_checkpointing
    activation_checkpointing_enable = activation_checkpointing_disable = set_grad_checkpointing

    def _freeze(self) -> None:
        for module in self.modules():
            module.requires_grad_(False)

    def load_model(self, path: str) -> None:
        self.loaded += 1

    def forward(self, x: Tensor) -> Tensor:
        x = self._act(self.stem(x + self.token))
        for block in self.blocks:
            x = x + self._act(block(x))
        return self.head(x * self.scale)


def wrapped() -> RIDEWrapper:
    return RIDEWrapper(Backbone(), 2, fork_at="blocks.2")


def test_plain_values_of_the_backbone_are_passed_on() -> None:
    model = wrapped()
    assert model.config.num_labels == 5
    assert model.default_cfg["mean"] == (0.5,)
    assert model.num_features == 16
    assert model.device == torch.device("cpu")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config.num_labels == 5


def test_what_nobody_has_is_missing() -> None:
    model = wrapped()
    assert not hasattr(model, "pretrained_cfg")
    assert not hasattr(model, "_private")
    assert not hasattr(model, "_names")  # engines ask for such, and its names are others now
    with pytest.raises(AttributeError, match="'RIDEWrapper' object has no attribute 'nothing'"):
        _ = model.nothing


@pytest.mark.filterwarnings("ignore:This code asks the model")
@pytest.mark.parametrize("name", ["load_model", "pieces", "_freeze", "_pieces"])
def test_what_would_reach_one_part_only_is_refused(name: str) -> None:
    model = wrapped()
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=rf"`{name}` on the backbone before wrapping"):
        getattr(model, name)
    assert model.trunk.loaded == 0


@pytest.mark.parametrize(
    ("name", "advice"), [("head", r"model\.experts\[k\]\.head"), ("load_model", "before wrapping")]
)
def test_a_question_whose_answer_hides_an_error_is_warned_of(name: str, advice: str) -> None:
    model = wrapped()
    with pytest.warns(UserWarning, match=rf"asks the model for `{name}`.*{advice}") as record:
        assert not hasattr(model, name)
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match=f"asks the model for `{name}`"):
        assert getattr(model, name, None) is None
    with pytest.warns(UserWarning, match=f"asks the model for `{name}`"):
        assert [m for m in (model,) if hasattr(m, name)] == []


def test_weights_are_saved_in_another_way() -> None:
    model = wrapped()
    saving = r"`model\.state_dict\(\)`.*`model\.to_module\(k\)\.save_pretrained\(\.\.\.\)`"
    model.trunk.__dict__["save_pretrained"] = print
    with pytest.raises(AttributeError, match=saving):
        model.save_pretrained("folder")


def test_an_error_that_is_heard_is_not_warned_of_as_well() -> None:
    with pytest.raises(AttributeError, match=r"`model\.experts\[k\]\.head`"):
        _ = wrapped().head
    with pytest.raises(AttributeError, match="before wrapping"):
        wrapped().load_model("file")


def test_libraries_may_ask_and_so_may_anybody_for_what_no_backbone_has() -> None:
    model = wrapped()
    assert not hasattr(model, "save_pretrained")
    asks = compile("found = hasattr(model, 'head')", "/lib/site-packages/engine/run.py", "exec")
    names = {"model": model}
    exec(asks, names)
    assert names["found"] is False
    copy.deepcopy(model)
    pickle.dumps(model)


def test_what_sets_something_in_each_module_can_be_called_on_every_part() -> None:
    model = wrapped()
    with pytest.raises(AttributeError, match=r"for part in \(model\.trunk, \*model\.experts\)"):
        model._freeze()
    for part in (model.trunk, *model.experts):
        part._freeze()
    assert not any(parameter.requires_grad for parameter in model.parameters())


class GivesFeatures(Backbone):
    def forward_features(self, x: Tensor) -> Tensor:
        return self._act(self.stem(x + self.token))


def test_features_come_from_what_the_router_reads() -> None:
    model = RIDEWrapper(GivesFeatures(), 2, fork_at="blocks.2")
    with pytest.raises(AttributeError, match=r"router_inputs\(x\)\.expert_features"):
        model.forward_features(torch.randn(3, 8))
    assert model.router_inputs(torch.randn(3, 8)).expert_features.shape == (3, 2, 16)


def test_adapters_are_merged_in_a_copy() -> None:
    model = wrapped()
    model.trunk.__dict__["merge_adapter"] = print
    with pytest.raises(AttributeError, match=r"`model\.to_module\(k\)\.merge_adapter\(\.\.\.\)`"):
        model.merge_adapter()


class Resizable(Backbone):
    """Changes what lies before the fork, of its own old size, as an image transformer does."""

    def set_input_size(self, size: int) -> None:
        old, repeats = self.token.shape[0], size // self.token.shape[0]
        self.token = nn.Parameter(self.token.detach().repeat(repeats))
        self.stem.weight = nn.Parameter(self.stem.weight.detach().repeat(1, repeats))
        assert self.stem.weight.shape[1] == old * repeats


def test_what_changes_the_trunk_is_called_there_alone() -> None:
    model = RIDEWrapper(Resizable(), 2, fork_at="blocks.2")
    with pytest.raises(AttributeError, match=r"the trunk alone, `model\.trunk\.set_input_size\("):
        model.set_input_size(16)
    model.trunk.set_input_size(16)
    x = torch.randn(3, 16)
    for k, plain in enumerate(copies_of(Resized(), model)):
        torch.testing.assert_close(expert_logits(model(x))[:, k], plain(x))


class Resized(Resizable):
    def __init__(self) -> None:
        super().__init__()
        self.set_input_size(16)


@pytest.mark.filterwarnings("ignore:This code asks the model")
@pytest.mark.parametrize(
    ("name", "in_trunk", "in_experts"),
    [
        *(("stem", True, False), ("_act", True, False)),
        ("head", False, True),
    ],
)
def test_parts_are_named_where_they_are_and_nowhere_else(
    name: str, in_trunk: bool, in_experts: bool
) -> None:
    model = wrapped()
    with pytest.raises(AttributeError, match="The backbone's exists once") as refused:
        getattr(model, name)
    assert (f"`model.trunk.{name}`" in str(refused.value)) is in_trunk
    assert (f"`model.experts[k].{name}`" in str(refused.value)) is in_experts
    model.add_module(name, nn.Linear(16, 5))
    with pytest.raises(AttributeError, match="to be replaced before wrapping") as replaced:
        model(torch.randn(2, 8))
    assert (f"`model.trunk.{name}`" in str(replaced.value)) is in_trunk
    assert (f"`model.experts[k].{name}`" in str(replaced.value)) is in_experts


def test_of_a_container_in_two_halves_the_parts_are_named() -> None:
    model = wrapped()
    with pytest.raises(AttributeError, match="exists once") as refused:
        _ = model.blocks
    assert re.findall(r"`(model\.(?:trunk|experts).*?)`", str(refused.value)) == [
        "model.trunk.blocks[0]",
        "model.trunk.blocks[1]",
        "model.experts[k].blocks[2]",
    ]


@pytest.mark.filterwarnings("ignore:This code asks the model")
@pytest.mark.parametrize(
    ("name", "place"), [("token", "model.trunk.token"), ("scale", "model.experts[k].scale")]
)
def test_tensors_are_named_where_they_are_and_nowhere_else(name: str, place: str) -> None:
    model = wrapped()
    for ask in (lambda: getattr(model, name), lambda: setattr(model, name, torch.ones(8))):
        with pytest.raises(AttributeError, match="exists once") as told:
            ask()
        assert re.findall(r"`(model\.(?:trunk|experts).*?)`", str(told.value)) == [place]


def test_the_classifiers_are_got_and_reset_for_every_expert() -> None:
    model = wrapped()
    assert tuple(model.get_classifier()) == model.classifiers
    model.reset_classifier(7)
    assert model.num_classes == 7
    x = torch.randn(3, 8)
    assert expert_logits(model(x)).shape == (3, 2, 7)
    assert model.router_inputs(x).expert_features.shape == (3, 2, 16)
    assert not torch.equal(model.classifiers[0].weight, model.classifiers[1].weight)
    with pytest.raises(ArgumentError, match="num_classes"):
        model.reset_classifier(0)


def test_gradient_checkpointing_is_that_of_the_experts() -> None:
    model = wrapped()
    model.set_grad_checkpointing()
    assert model.checkpoint_experts is True
    model.set_grad_checkpointing(False)
    assert model.checkpoint_experts is False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.checkpoint_experts is True
    model.gradient_checkpointing_disable()
    assert model.checkpoint_experts is False
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=None, every_n_layers=2)
    assert model.checkpoint_experts is True
    model.activation_checkpointing_disable()
    assert model.checkpoint_experts is False


@pytest.mark.parametrize("value", [None, {}, False, {"use_reentrant": False}])
def test_checkpointing_is_enabled_whatever_says_how(value: Any) -> None:
    model = wrapped()
    model.gradient_checkpointing_enable(value)  # Hugging Face's first argument
    assert model.checkpoint_experts is True
    model.gradient_checkpointing_disable()
    assert model.checkpoint_experts is False
    model.set_grad_checkpointing(True, value)
    assert model.checkpoint_experts is True
    model.set_grad_checkpointing(enable=False)
    assert model.checkpoint_experts is False


class Pooled(Backbone):
    """Resets its classifier as timm's models do, which hold the pooling in one of three places."""

    def __init__(self, place: str) -> None:
        super().__init__()
        pool = nn.Identity()
        pool.pool_type = "avg"
        if place == "setting":
            self.global_pool = "avg"
        elif place == "module":
            self.global_pool = pool
        else:
            self._act.global_pool = pool

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise AssertionError("must not be called")


@pytest.mark.parametrize("place", ["setting", "module", "in a module"])
def test_a_classifier_is_reset_with_the_pooling_that_there_is(place: str) -> None:
    model = RIDEWrapper(Pooled(place), 2, fork_at="blocks.2")
    model.reset_classifier(6, "avg")
    model.reset_classifier(7, global_pool=None)
    model.reset_classifier(num_classes=8, global_pool="avg")
    assert expert_logits(model(torch.randn(3, 8))).shape == (3, 2, 8)
    for reset in (
        lambda: model.reset_classifier(9, "max"),
        lambda: model.reset_classifier(9, global_pool=torch.ones(2)),
    ):
        with pytest.raises(ArgumentError, match=r"`global_pool` to be left out, None.*before wrap"):
            reset()
    with pytest.raises(TypeError, match="unexpected keyword argument 'distilled'"):
        model.reset_classifier(9, distilled=True)
    assert model.num_classes == 8


def test_a_backbone_without_such_methods_offers_none() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    model = RIDEWrapper(net, 2, fork_at="2")
    assert not hasattr(model, "no_weight_decay")
    assert not hasattr(model, "set_grad_checkpointing")


@pytest.mark.compiles
def test_a_compiled_model_still_finds_its_own() -> None:
    model = wrapped().eval()
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_a_model_may_be_rebuilt_module_by_module() -> None:
    model = wrapped().eval()
    again = RIDEWrapper.__new__(RIDEWrapper)
    again.__dict__.update(model.__dict__)
    again._modules = {}
    assert not hasattr(again, "trunk")
    for name, part in model.named_children():
        again.add_module(name, part)
    x = torch.randn(3, 8)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("name", ["head", "stem", "blocks"])
def test_a_module_that_would_not_run_is_refused(name: str) -> None:
    model = RIDEWrapper(Backbone(), 2, fork_at="blocks.1")
    with pytest.raises(AttributeError, match=f"`{name}` to be replaced before wrapping"):
        setattr(model, name, nn.Linear(16, 9))
    assert name not in dict(model.named_children())
    for add in (model.add_module, model._modules.__setitem__):
        add(name, nn.Linear(16, 9))
        with pytest.raises(AttributeError, match=f"`{name}` to be replaced before wrapping"):
            model(torch.randn(2, 8))
        del model._modules[name]
    model.teacher = nn.Linear(8, 5)  # a name that the backbone does not have
    model.experts = model.experts
    assert model(torch.randn(2, 8)).shape == (2, 5)


class Follows(Backbone):
    """Its forward reads plain attributes that training code sets from epoch to epoch."""

    factor, _slope = 1.0, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.epoch, self.act, self.weights = 0, nn.functional.relu, torch.ones(5)
        self._step = 0

    @property
    def doubled(self) -> float:
        return self.factor * 2

    @doubled.setter
    def doubled(self, value: float) -> None:
        self.factor = value / 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x)) * (1 + self.epoch) * self.factor * self._slope
        for block in self.blocks:
            x = self.act(block(x)) * (1 + self.epoch + self._step)
        return self.head(x * self.scale) * self.factor * self.weights


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epoch", 3), ("factor", 0.5), ("doubled", 3.0), ("act", torch.tanh)),
        *(("weights", torch.arange(5.0)), ("_step", 3), ("_slope", 2.0)),
    ],
)
def test_what_the_forward_reads_is_set_in_every_part(name: str, value: Any) -> None:
    backbone = Follows()
    model = RIDEWrapper(backbone, 3, fork_at="blocks.1").eval()
    plain = [model.to_module(k) for k in range(3)]
    x = torch.randn(4, 8)
    for module in plain:
        setattr(module, name, value)
    wanted = torch.stack([module(x) for module in plain], dim=1)
    setattr(model, name, value)
    torch.testing.assert_close(expert_logits(model(x)), wanted)
    torch.testing.assert_close(model.to_module(1)(x), wanted[:, 1])
    assert callable(value) or isinstance(value, Tensor) or getattr(model, name) == value
    assert name not in vars(model)
    again = copy.deepcopy(model)
    torch.testing.assert_close(expert_logits(again(x)), wanted)


class Asks(Follows):
    """Its methods ask for attributes that nobody has set yet."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = functools.partial(self.tenfold, by=10.0)

    def tenfold(self, x: Tensor, by: float) -> Tensor:
        return by * self.scaled(x)

    @torch.no_grad()
    def scaled(self, x: Tensor) -> Tensor:
        x = Follows.forward(self, x) * getattr(self, "late", 1.0) * self.private
        for name in ("first", "second"):
            x = x * getattr(self, name, 1.0)
        return x * self.mask if hasattr(self, "mask") else x

    @property
    def private(self) -> float:
        return (lambda: vars(self).get("_bias", 1.0))()


@pytest.mark.parametrize(
    ("name", "value"),
    [("late", 3.0), ("_bias", 3.0), ("second", 2.0), ("mask", torch.arange(5.0))],
)
def test_what_the_backbone_has_not_yet_is_set_where_its_code_reads_it(
    name: str, value: Any
) -> None:
    backbone = Asks()
    model = RIDEWrapper(backbone, 3, fork_at="blocks.1").eval()
    x = torch.randn(4, 8)
    before, copies = expert_logits(model(x)), copies_of(backbone, model)
    assert not hasattr(model, name)
    for factor in (1, 2):
        for each in copies:
            setattr(each.eval(), name, factor * value)
        setattr(model, name, factor * value)
        wanted = torch.stack([each(x) for each in copies], dim=1)
        torch.testing.assert_close(expert_logits(model(x)), wanted)
        assert not torch.equal(wanted, before)
        assert torch.equal(torch.as_tensor(getattr(model, name)), torch.as_tensor(factor * value))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(expert_logits(again(x)), wanted)
    delattr(model, name)
    assert not hasattr(model, name)
    assert torch.equal(expert_logits(model(x)), before)
    with pytest.raises(AttributeError):
        delattr(model, name)


class Initialises(Follows):
    """A method that the forward does not call notes something on every module for a while."""

    def init_weights(self) -> None:
        for module in self.modules():
            module._noted = []
        self._noted.append(1)
        for module in self.modules():
            del module._noted

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, "late", 1.0)


def test_what_other_methods_mention_is_left_to_the_module_that_it_is_set_on() -> None:
    model = RIDEWrapper(Initialises(), 2, fork_at="blocks.1")
    for module in model.modules():
        module._noted = []
    for module in model.modules():
        del module._noted
    assert not any(hasattr(module, "_noted") for module in model.modules())
    model.late = 2.0
    assert model.trunk.late == model.experts[1].late == 2.0


def test_what_the_backbone_has_not_yet_and_parts_cannot_hold_together_is_told() -> None:
    model = RIDEWrapper(Asks(), 2, fork_at="blocks.1")
    model._old_forward, model.scaled_by = model.forward, nn.ReLU()  # as engines do
    for name, value in (("mask", nn.Parameter(torch.ones(5))), ("first", model.forward)):
        with pytest.warns(UserWarning, match=f"reads `{name}`, but it is set on the wrapped model"):
            setattr(model, name, value)
        assert not any(hasattr(part, name) for part in (model.trunk, *model.experts))


class Counts(nn.Module):
    """Counts its calls, in trunk and experts, in an attribute that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.fc = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.fc(self.late(self.early(x))) * self.calls


@pytest.mark.parametrize("called", [False, True])
def test_a_count_that_is_set_on_the_model_goes_on_in_its_parts(called: bool) -> None:
    model, x = RIDEWrapper(Counts(), 3, fork_at="late").eval(), torch.randn(4, 8)
    if called:
        model(x)
    model.calls = 10
    torch.testing.assert_close(model(x) / 11, model(x) / 12)
    assert model.calls == 12


class Notes(nn.Module):
    """Leaves numbers on itself: before the fork, and after it other ones for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.fc = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.first, self.penalty, self.calls, self.seen = 0.0, 0.0, 0, list[float]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        self.first = x.mean().item()
        x = self.late(x)
        self.penalty, self.calls = x.mean().item(), self.calls + 1
        self.seen.append(self.penalty)
        return self.fc(x)


def test_what_a_forward_leaves_on_each_expert_is_not_read_off_another() -> None:
    model = RIDEWrapper(Notes(), 3, fork_at="late").eval()
    x = torch.randn(4, 8)
    for _ in range(2):
        model(x)
    assert model.calls == 2  # the same for all
    assert model.first == model.trunk.early(x).mean().item()
    with pytest.raises(AttributeError, match=r"in its forward: `model\.experts\[k\]\.penalty`"):
        _ = model.penalty
    with pytest.raises(AttributeError, match=r"in its forward: `model\.experts\[k\]\.seen`"):
        _ = model.seen
    model.seen, model.calls = [], 10
    model(x)
    assert [expert.seen for expert in model.experts] == [[e.penalty] for e in model.experts]
    assert model.calls == 11


def test_attributes_of_nobody_and_of_the_wrapped_model_are_its_own() -> None:
    model = RIDEWrapper(Follows(), 2, fork_at="blocks.1")
    model.note, model._act, model.num_classes = "mine", None, model.num_classes
    assert not any("note" in vars(part) for part in (model.trunk, *model.experts))
    assert all(isinstance(part._act, nn.ReLU) for part in (model.trunk, *model.experts))
    assert model.note == "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [("fork_at", "blocks.0"), ("expert_width", 0.5), ("num_experts", 3), ("num_classes", 9)],
)
def test_what_was_decided_at_wrapping_cannot_be_set_afterwards(name: str, value: object) -> None:
    model = RIDEWrapper(Follows(), 2, fork_at="blocks.1")
    before = getattr(model, name)
    with pytest.raises(AttributeError, match=rf"`RIDEWrapper\(backbone, {name}={value!r}\)`"):
        setattr(model, name, value)
    setattr(model, name, before)
    assert getattr(copy.deepcopy(model), name) == before


def test_private_names_are_the_backbones_where_it_had_them_when_it_was_wrapped() -> None:
    model = RIDEWrapper(Follows(), 2, fork_at="blocks.1")
    assert not hasattr(model, "_step")
    model._step = 3
    model.trunk._step += 1  # as its forward may
    assert model._step == 4
    for module in (*model.trunk.modules(), model):  # as engines mark every module
        module._mark = id(module)
    assert model._mark == id(model)
    assert model.trunk._mark == id(model.trunk)
    again = pickle.loads(pickle.dumps(model))
    again._step = 5
    assert [part._step for part in (again.trunk, *again.experts)] == [5] * 3
    model._step = model.trunk._names
    assert model._step == ["stem"]


class Namesake(Follows):
    """Has attributes of names that the wrapped model has."""

    num_classes, checkpoint_experts = 5, False

    def __init__(self) -> None:
        super().__init__()
        self.start, self._late, self._links, self._running = 1.0, 0, 2.0, 3

    def parts(self) -> int:
        return 3

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.start


class Subclass(RIDEWrapper):
    epoch = 0


@pytest.mark.parametrize(
    "name", ["start", "parts", "_late", "num_classes", "_links", "_running", "run_trunk"]
)
def test_a_name_of_both_is_not_set_on_the_wrapped_model_alone(name: str) -> None:
    model = RIDEWrapper(Namesake(), 2, fork_at="blocks.1").eval()
    x = torch.randn(3, 8)
    if name == "run_trunk":  # the backbone does not have it
        model.run_trunk = model.run_trunk
        return
    with pytest.raises(AttributeError, match=rf"both.*of this name.*experts\): part\.{name} = "):
        setattr(model, name, 10.0)
    before = model(x)
    for part in (model.trunk, *model.experts):
        part.start = 10.0
    torch.testing.assert_close(model(x), 10 * before)
    model.load_state_dict(
        copy.deepcopy(model.state_dict())
    )  # which writes attributes of the model's own
    model.reset_classifier(5)
    model.checkpoint_experts, model.return_experts = True, "training"
    model.train(False).to(torch.float64)
    assert model(x.double()).shape == (3, 5)


def test_a_subclass_sets_what_it_defines() -> None:
    model = Subclass(Follows(), 2, fork_at="blocks.1")
    model.epoch = 3
    assert model.epoch == 3
    assert model.trunk.epoch == 0


def test_what_cannot_be_the_same_in_every_part_is_told() -> None:
    model = RIDEWrapper(Follows(), 2, fork_at="blocks.1")
    with pytest.raises(AttributeError, match="`token` to be replaced before wrapping"):
        model.token = torch.ones(8)
    for name, value in (("pieces", []), ("group_matcher", model.forward), ("act", nn.ReLU())):
        with pytest.warns(UserWarning, match=f"`{name}`, but it is set on the wrapped model alone"):
            setattr(model, name, value)


class Unset(Backbone):
    """Has a buffer and a parameter that are None until somebody fills them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("thresholds", None)
        self.register_parameter("offset", None)


def test_none_may_be_set_where_none_is() -> None:
    model = RIDEWrapper(Unset(), 2, fork_at="blocks.2")
    for name in ("thresholds", "offset"):
        setattr(model, name, None)
        assert getattr(model, name) is None
        assert name not in vars(model)
        with pytest.raises(AttributeError, match=f"`{name}` to be replaced before wrapping"):
            setattr(model, name, torch.ones(5))
    with pytest.raises(AttributeError, match="`token` to be replaced before wrapping"):
        model.token = None


class Grouped(Backbone):
    """Says how an optimizer should treat its parameters, in the ways that are in use."""

    def no_weight_decay_keywords(self) -> set[str]:
        return {"scale"}

    def get_param_groups(self, lr: float, head: float = 10.0) -> list[dict[str, Any]]:
        heads = [p for name, p in self.named_parameters() if name.startswith("head")]
        rest = [p for name, p in self.named_parameters() if not name.startswith("head")]
        return [{"params": rest, "lr": lr}, {"params": heads, "lr": head * lr, "name": "head"}]

    def get_optim_policies(self) -> list[dict[str, Any]]:
        return self.get_param_groups(0.1, head=5.0)

    def by_layers(self) -> list[dict[str, Any]]:
        return self.get_param_groups(0.1, head=5.0)

    def get_1x_lr_params(self) -> Any:
        yield from self.stem.parameters()
        yield from self.blocks.parameters()

    def get_num_params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def get_parameters(self) -> list[str]:
        return ["not", "what", "it", "says"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.get_param_groups(0.1, head=5.0),
        lambda model: model.get_optim_policies(),
        lambda model: model.parameter_groups_by(lambda network: network.by_layers()),
    ],
)
def test_groups_of_parameters_are_those_of_trunk_and_all_experts(ask: Any) -> None:
    model = RIDEWrapper(Grouped(), 3, fork_at="blocks.2")
    rest, heads = ask(model)
    assert (rest["lr"], heads["lr"], heads["name"]) == (0.1, 0.5, "head")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = [f"experts.{k}.head.{kind}" for k in range(3) for kind in ("weight", "bias")]
    assert [names[id(parameter)] for parameter in heads["params"]] == expected
    found = [names[id(parameter)] for parameter in rest["params"] + heads["params"]]
    assert sorted(found) == sorted(names.values())  # each once
    optimizer = torch.optim.SGD([rest, heads])
    before = [classifier.weight.clone() for classifier in model.classifiers]
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    for old, classifier in zip(before, model.classifiers, strict=True):
        assert not torch.equal(old, classifier.weight)


def test_a_method_of_another_name_is_refused_with_the_way_to_groups() -> None:
    model = RIDEWrapper(Grouped(), 3, fork_at="blocks.2")
    told = r"`model\.parameter_groups_by\(lambda network: network\.by_layers\(\.\.\.\)\)`"
    with pytest.raises(AttributeError, match=told):
        model.by_layers()


def test_a_generator_of_parameters_becomes_a_list() -> None:
    model = RIDEWrapper(Grouped(), 2, fork_at="blocks.2")
    found = model.get_1x_lr_params()
    trunk = [*model.trunk.stem.parameters(), *model.trunk.blocks.parameters()]
    own = [p for expert in model.experts for p in expert.blocks.parameters()]
    assert {id(p) for p in found} == {id(p) for p in (*trunk, *own)}
    assert len(found) == len(trunk) + len(own)


def test_keywords_without_weight_decay_are_parts_of_the_models_names() -> None:
    model = RIDEWrapper(Grouped(), 2, fork_at="blocks.2")
    (keyword,) = model.no_weight_decay_keywords()
    assert [n for n, _ in model.named_parameters() if keyword in n] == [
        "experts.0.scale",
        "experts.1.scale",
    ]


def test_methods_that_count_or_return_something_else_are_no_groups() -> None:
    model = RIDEWrapper(Grouped(), 2, fork_at="blocks.2")
    with pytest.raises(AttributeError, match="Call `get_num_params` on the backbone"):
        model.get_num_params()
    with pytest.raises(ArgumentError, match=r"`get_parameters` to return parameters .* got list"):
        model.get_parameters()
