import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from ride_plugin import RIDEError, RIDEWrapper, expert_logits
from ride_plugin.longtail import (
    find_classifiers,
    freeze_representation,
    learnable_weight_scaling,
    reset_classifiers,
    tau_normalize,
    tau_normalized,
)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.fixture
def model() -> RIDEWrapper:
    return RIDEWrapper(net(), num_experts=2, example_input=torch.randn(2, 3, 8, 8))


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))


def test_classifiers_are_found_in_every_form(model) -> None:
    plain = net()
    assert find_classifiers(model) == list(model.classifiers) != []
    assert find_classifiers(plain, "8") == [plain[8]]
    assert find_classifiers(plain[8]) == [plain[8]]
    assert find_classifiers([plain[8], plain[0]]) == [plain[8], plain[0]]
    assert find_classifiers(nn.ModuleList([plain[8]])) == [plain[8]]


@pytest.mark.parametrize(
    "engine",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: nn.Sequential(nn.Identity(), nn.DataParallel(model)),
        pytest.param(lambda m: torch.compile(m, backend="eager"), marks=pytest.mark.compiles),
    ],
    ids=["parallel", "averaged", "sequence", "compiled"],
)
def test_the_wrapped_model_inside_of_an_engine_is_the_one(model, engine) -> None:
    outer = engine(model)
    inner = RIDEWrapper.inside(outer)
    assert find_classifiers(outer) == list(inner.classifiers)
    before = [layer.weight.clone() for layer in inner.classifiers]
    reset_classifiers(outer)
    for old, layer in zip(before, inner.classifiers, strict=True):
        assert not torch.equal(old, layer.weight)
    trained = freeze_representation(outer)
    heads = [p for layer in inner.classifiers for p in layer.parameters()]
    assert [id(p) for p in trained] == [id(p) for p in heads]
    assert [id(p) for p in outer.parameters() if p.requires_grad] == [id(p) for p in heads]


def test_one_wrapped_model_that_an_engine_holds_twice_is_one(model) -> None:
    engine = nn.ModuleDict({"model": model, "parallel": nn.Sequential(model)})
    assert find_classifiers(engine) == list(model.classifiers)


def test_several_wrapped_models_inside_are_refused(model) -> None:
    pair = nn.ModuleDict({"student": model, "teacher": copy.deepcopy(model)})
    with pytest.raises(RIDEError, match="one wrapped model, but got ModuleDict with 2 inside"):
        find_classifiers(pair)


def test_a_head_that_is_a_bare_parameter_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(6, 8), nn.Linear(8, 8)
            self.head = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return self.late(self.early(x).relu()).relu() @ self.head.t()

    model = RIDEWrapper(Bare(), 2, fork_at="late", example_input=torch.randn(2, 6))
    for function in (find_classifiers, reset_classifiers, freeze_representation):
        for outer in (model, nn.DataParallel(model)):
            with pytest.raises(RIDEError, match=r"layer as its classifier.*bare parameter"):
                function(outer)
    assert all(p.requires_grad for p in model.parameters())


def test_classifiers_not_found_are_named() -> None:
    with pytest.raises(RIDEError, match=r"`classifier`.*Sequential.*'fc'.*'8'"):
        find_classifiers(net(), "fc")
    with pytest.raises(RIDEError, match=r'`model`.*Sequential.*classifier="fc"'):
        find_classifiers(net())
    with pytest.raises(RIDEError, match=r"`model`.*list"):
        find_classifiers([])


def test_crt_retrains_the_classifiers_and_nothing_else(model) -> None:
    before = copy.deepcopy(model.state_dict())
    trained = freeze_representation(model)
    reset_classifiers(model)
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    heads = {id(p) for layer in model.classifiers for p in layer.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in heads}
    assert len(names) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in names), name


def test_reset_draws_each_expert_anew(model) -> None:
    with torch.no_grad():
        for layer in model.classifiers:
            layer.weight.zero_()
    reset_classifiers(model)
    first, second = (layer.weight for layer in model.classifiers)
    assert not (first == 0).any()
    assert not torch.equal(first, second)


def test_reset_and_freeze_work_with_cosine_classifiers() -> None:
    model = RIDEWrapper(
        net(), num_experts=2, classifier="cosine", example_input=torch.randn(2, 3, 8, 8)
    )
    old = [layer.weight.clone() for layer in model.classifiers]
    reset_classifiers(model)
    assert not any(torch.equal(a, b.weight) for a, b in zip(old, model.classifiers, strict=True))
    assert len(freeze_representation(model)) == 2
    with pytest.raises(RIDEError, match=r"tau_normalize, but got CosineClassifier.*unit weights"):
        tau_normalize(model, 1.0)


def test_reset_without_initialisation_is_refused() -> None:
    with pytest.raises(RIDEError, match=r"reset_parameters\(\), but got Cosine"):
        reset_classifiers([Cosine()])


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tau_norm_equals_the_equation_by_loops(tau: float) -> None:
    weight = torch.randn(5, 3, dtype=torch.float64)
    for row, out in zip(weight.tolist(), tau_normalized(weight, tau).tolist(), strict=True):
        norm = sum(w * w for w in row) ** 0.5
        assert out == pytest.approx([w / norm**tau for w in row])


def test_tau_norm_changes_every_experts_classifier_in_place(model) -> None:
    layers = model.classifiers
    old = [layer.weight.detach().clone() for layer in layers]
    tau_normalize(model, [0.5, 1.0])
    for layer, weight, tau in zip(layers, old, (0.5, 1.0), strict=True):
        assert torch.equal(layer.weight, tau_normalized(weight, tau))
        assert not layer.bias.any()
    assert layers == model.classifiers


def test_tau_norm_of_a_plain_model_and_of_a_layer_without_bias() -> None:
    plain, layer = net(), nn.Linear(8, 4, bias=False)
    tau_normalize(plain, 1, classifier="8")
    tau_normalize(layer, 1)
    for weight in (plain[8].weight, layer.weight):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(4))


def test_tau_norm_leaves_the_model_alone_when_it_fails(model) -> None:
    with torch.no_grad():
        model.classifiers[1].weight[2] = 0
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RIDEError, match=r"`weight`.*norm > 0"):
        tau_normalize(model, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_tau_is_named(model) -> None:
    with pytest.raises(RIDEError, match=r"`tau`.*-1"):
        tau_normalize(model, -1.0)
    with pytest.raises(RIDEError, match=r"`tau` to be one number or 2.*got 3"):
        tau_normalize(model, [1.0, 1.0, 1.0])
    with pytest.raises(RIDEError, match=r"`weight`.*\[C, D\].*\[3\]"):
        tau_normalized(torch.ones(3), 1.0)
    with pytest.raises(RIDEError, match=r"`tau` to leave the weights finite, but got 100 for"):
        tau_normalized(torch.full((3, 4), 0.1), 100)


def test_weight_scaling_starts_as_the_identity(model) -> None:
    model.eval()
    before = model(X)
    learnable_weight_scaling(model)
    assert torch.equal(model(X), before)


def test_weight_scaling_multiplies_the_whole_logit() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(5, 8)
    logits = layer(x)
    [scaling] = learnable_weight_scaling(layer)
    factors = torch.tensor([0.5, 1.0, 2.0, 3.0])
    with torch.no_grad():
        scaling.scale.copy_(factors)
    torch.testing.assert_close(layer(x), factors * logits)


def test_weight_scaling_trains_the_scales_alone_inside_a_wrapped_model(model) -> None:
    freeze_representation(model)
    scalings = learnable_weight_scaling(model)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(s.scale) for s in scalings]
    optimizer = torch.optim.SGD([s.scale for s in scalings], lr=1.0)
    nn.functional.cross_entropy(model(X), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    assert all((s.scale != 1).all() for s in scalings)


def test_weight_scaling_folds_into_the_layer(model) -> None:
    model.eval()
    for scaling in learnable_weight_scaling(model):
        nn.init.uniform_(scaling.scale, 0.5, 2.0)
    scaled = model(X)
    with pytest.raises(RIDEError, match=r"reset_classifiers.*remove_parametrizations"):
        reset_classifiers(model)
    with pytest.raises(RIDEError, match=r"tau_normalize.*remove_parametrizations"):
        tau_normalize(model, 1.0)
    for layer in model.classifiers:
        for name in ("weight", "bias"):
            parametrize.remove_parametrizations(layer, name)
    torch.testing.assert_close(model(X), scaled)
    tau_normalize(model, 1.0)


def test_weight_scaling_twice_is_refused(model) -> None:
    learnable_weight_scaling(model)
    with pytest.raises(RIDEError, match=r"learnable_weight_scaling.*parametrized"):
        learnable_weight_scaling(model)


def test_tau_norm_in_half_precision_is_computed_in_float32() -> None:
    weight = torch.full((2, 4), 200.0)  # whose norm to the power of two is no float16
    half = tau_normalized(weight.half(), 2.0)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), tau_normalized(weight, 2.0), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "computed",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    ],
)
def test_weights_that_a_hook_computes_are_refused(computed) -> None:
    layer = computed(nn.Linear(4, 3))
    for method in (lambda: tau_normalize(layer, 1.0), lambda: reset_classifiers(layer)):
        with pytest.raises(RIDEError, match="computed before each forward"):
            method()


@pytest.fixture
def sharing() -> RIDEWrapper:
    """Experts whose classifiers are one frozen weight."""
    backbone = net()
    backbone[-1].requires_grad_(False)
    return RIDEWrapper(backbone, 3, example_input=X)


def test_a_shared_weight_takes_one_tau(sharing) -> None:
    before = sharing.classifiers[0].weight.clone()
    with pytest.raises(RIDEError, match="`tau` to be one number, since classifiers share a weight"):
        tau_normalize(sharing, [0.5, 0.5, 1.0])
    assert sharing.classifiers[0].weight.equal(before)
    tau_normalize(sharing, 0.5)
    assert sharing.classifiers[2].weight.equal(tau_normalized(before, 0.5))


def test_a_shared_weight_is_listed_once_for_the_optimiser(sharing) -> None:
    parameters = freeze_representation(sharing)
    assert [list(parameter.shape) for parameter in parameters] == [[4, 8], [4]]


def test_experts_scale_a_shared_weight_each_by_itself(sharing) -> None:
    sharing.eval()
    plain = expert_logits(sharing(X))
    for factor, scaling in enumerate(learnable_weight_scaling(sharing), start=1):
        nn.init.constant_(scaling.scale, float(factor))
    factors = torch.tensor([1.0, 2.0, 3.0])[:, None]
    torch.testing.assert_close(expert_logits(sharing(X)), factors * plain)
    copied = copy.deepcopy(sharing)
    torch.testing.assert_close(expert_logits(copied(X)), factors * plain)
    for layer in sharing.classifiers:
        parametrize.remove_parametrizations(layer, "weight")
        parametrize.remove_parametrizations(layer, "bias")
    torch.testing.assert_close(expert_logits(sharing(X)), factors * plain)


def test_scaling_a_layer_leaves_what_it_is_tied_to_alone() -> None:
    embedding, layer = nn.Embedding(4, 8), nn.Linear(8, 4)
    layer.weight = embedding.weight
    before = embedding.weight.detach().clone()
    [scaling] = learnable_weight_scaling(layer)
    nn.init.constant_(scaling.scale, 3.0)
    parametrize.remove_parametrizations(layer, "weight")
    assert embedding.weight.equal(before)
    assert embedding.weight.requires_grad
    assert layer.weight.equal(3 * before)


def test_a_layer_that_comes_twice_is_not_scaled_twice() -> None:
    layer = nn.Linear(8, 4)
    with pytest.raises(RIDEError, match="got one layer twice, which learnable_weight_scaling"):
        learnable_weight_scaling([layer, layer])
    with pytest.raises(RIDEError, match="got one layer twice, which tau_normalize"):
        tau_normalize([layer, layer], 0.5)
    assert not parametrize.is_parametrized(layer)


def test_scaled_classifiers_train_their_factors_alone_when_the_rest_is_frozen(model) -> None:
    scalings = learnable_weight_scaling(model)
    parameters = freeze_representation(model)
    assert [id(p) for p in parameters] == [id(s.scale) for s in scalings]
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]


def test_other_parametrizations_train_the_weight_below(model) -> None:
    layer = model.classifiers[0]
    nn.utils.parametrizations.orthogonal(layer)
    assert len(freeze_representation(model)) == 4
    assert layer.parametrizations.weight.original.requires_grad


class Normed(nn.Linear):
    """As codes for long tails write it: no scaling of a class's weight changes anything."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        directions = nn.functional.normalize(x, dim=1), nn.functional.normalize(self.weight, dim=1)
        return 16 * nn.functional.linear(*directions)


class TakesTwo(nn.Linear):
    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + label


class Same(nn.Linear):
    """In a forward of its own, but what nn.Linear computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self.weight.double().T).to(x.dtype) + self.bias


@pytest.mark.parametrize("kind", [Normed, TakesTwo])
def test_a_linear_layer_that_computes_something_else_is_refused(kind) -> None:
    layer = kind(8, 4)
    before = layer.weight.detach().clone()
    with pytest.raises(RIDEError, match=rf"for tau_normalize, but got {kind.__name__}, whose"):
        tau_normalize(layer, 0.5)
    with pytest.raises(RIDEError, match=r"nn.Linear classifiers for learnable_weight_scaling"):
        learnable_weight_scaling([nn.Linear(8, 4), layer])
    assert layer.weight.equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_with_a_forward_of_its_own_that_computes_the_same_is_taken(dtype) -> None:
    layer = Same(8, 4).to(dtype)
    before = layer.weight.detach().clone()
    tau_normalize(layer, 0.5)
    assert layer.weight.equal(tau_normalized(before, 0.5))


class Tied(nn.Module):
    """A language model: the classifier's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.fc = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.fc.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.embedding(tokens).mean(1)).relu())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "change",
    [reset_classifiers, freeze_representation, partial(tau_normalize, tau=1.0)],
    ids=["reset", "freeze", "tau"],
)
def test_a_classifier_that_is_tied_to_an_embedding_is_refused_until_it_is_not(
    change, wrapped
) -> None:
    model: nn.Module = Tied()
    tokens, named = torch.randint(6, (4, 3)), {"classifier": "fc"}
    if wrapped:
        model, named = RIDEWrapper(model, 2, fork_at="body", example_input=tokens), {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RIDEError, match=r"whose weight is that of `(trunk.)?embedding` as well"):
        change(model, **named)
    for name, value in model.state_dict().items():
        assert value.equal(before[name])
    assert all(p.requires_grad for p in model.parameters())
    for layer in find_classifiers(model, **named):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    change(model, **named)
    embedding = model.trunk.embedding if wrapped else model.embedding
    assert embedding.weight.equal(next(iter(before.values())))
    out = model(tokens)
    assert out.shape == (4, 6)
    find_classifiers(model, **named)[0].weight.data.zero_()
    assert not torch.equal(model(tokens), out)  # it is what the model runs
