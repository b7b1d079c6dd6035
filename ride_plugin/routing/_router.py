"""The expert router: does this sample need one more expert? (paper, section 3, stage two)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ride_plugin._checks import (
    check_choice,
    check_floating,
    check_integer,
    check_numbers,
    check_predictions,
    is_finite,
    refuse,
)
from ride_plugin._devices import keeping_digits
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better, without_autocast
from ride_plugin._output import RouterInputs
from ride_plugin._split import refuse_plain_state
from ride_plugin.functional import running_means


class SizedModel(Protocol):
    """What the router needs to know of a wrapped model."""

    num_experts: int
    num_classes: int
    feature_dim: int


Reading = Literal["predictions", "paper"]
_HIDDEN_DIM: dict[Reading, int] = {"predictions": 32, "paper": 16}
_CLASS_DIM = 8
_LARGEST = 1e18  # of a statistic: float32 holds its square, and so the variance
_ADVICE = "Build the router with `ExpertRouter.for_model(model)`."


class ExpertRouter(nn.Module):
    r"""Decides after each expert but the last whether a sample needs one more.

    Gate $i$, for $i = 0 \dots E-2$, reads what is known once experts $0 \dots i$ have run. With
    $\bar z$ the mean of their logits and $p = \mathrm{softmax}(\bar z)$,

    $$g_i = w^\top [m_i \,;\, \mathrm{relu}(W_i x_i + b_i)] + b, \qquad
    x_i = \bigl[s(\bar z) \,;\, \textstyle\sum_{c \in \mathrm{top}_k} p_c\, v_c\bigr],$$

    where $m_i$ is the margin of the largest probability over the second (with $k = 1$, where only
    one class is looked at, over all the others together: twice the largest probability less one),
    $s$ holds the $k$ largest logits less the mean of all, the largest probability, $m_i$ and the
    entropy, each brought to zero mean and unit deviation over the samples seen in training, and
    $v_c$ is a learned vector of 8 numbers for each class. The probability that one more expert is
    needed is $\sigma(g_i)$. A new router has $g_i = 6\,(1/2 - m_i)$: it exits by the margin, and
    learns where to depart from that. Not in the paper: at equal cost it was more accurate than the
    paper's gate, and on most models than exits by confidence, see the results page.

    ``inputs="paper"`` is the layout of the authors' code (paper, section 3, "Routing"), into which
    their checkpoints load. It reads expert $i$'s pooled feature $f_i$,

    $$g_i = w^\top [\mathrm{top}_k(\bar z) \,;\, \mathrm{relu}(W_i f_i / \|f_i\| + b_i)] + b.$$

    Differs from their code: $k$ is at most the number of classes and an all-zero feature stays zero
    instead of becoming NaN. In both, $w$ and $b$ are shared by all gates, and a class masked by a
    logit of $-\infty$ enters as 0.

    Args:
        feature_dim: $D$, size of an expert's pooled feature (the input of its classifier).
        num_experts: $E$, at least 2.
        num_classes: $C$, at least 2.
        inputs: what the gates read: ``"predictions"`` or, as the paper has it, ``"paper"``.
        top_k: how many of the largest mean logits a gate reads; the authors use 30.
        hidden_dim: width of each gate's hidden layer; by default 32, with ``"paper"`` 16.

    Raises:
        ArgumentError: a size is out of range, or ``inputs`` is neither.

    Example:
        >>> router = ExpertRouter(64, 3, num_classes=10)
        >>> gate_logits = router((torch.randn(4, 3, 10), torch.randn(4, 3, 64)))
        >>> tuple(gate_logits.shape)
        (4, 2)
    """

    input_mean: Tensor
    input_variance: Tensor
    samples_seen: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_experts: int,
        *,
        num_classes: int,
        inputs: Reading = "predictions",
        top_k: int = 30,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.feature_dim = check_integer(feature_dim, "feature_dim", 1)
        self.num_experts = check_integer(
            num_experts,
            "num_experts",
            2,
            advice="With one expert there is nothing to route: use the model's output as it is.",
        )
        self.num_classes = check_integer(num_classes, "num_classes", 2)
        self._inputs: Reading = check_choice(inputs, "inputs", get_args(Reading))
        self._top_k = min(check_integer(top_k, "top_k", 1), self.num_classes)
        if hidden_dim is None:
            hidden_dim = _HIDDEN_DIM[self.inputs]
        hidden_dim = check_integer(hidden_dim, "hidden_dim", 1)
        gates = self.num_experts - 1
        if self.inputs == "paper":
            read, direct = self.feature_dim, self.top_k
        else:
            statistics = self.top_k + 3
            read, direct = statistics + _CLASS_DIM, 1
            self.classes = nn.Embedding(self.num_classes, _CLASS_DIM)
            nn.init.normal_(self.classes.weight, std=0.3)
            # Half precision, if that is torch's default, would lose what later samples add.
            wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.register_buffer("input_mean", torch.zeros(gates, statistics, dtype=wide))
            self.register_buffer("input_variance", torch.ones(gates, statistics, dtype=wide))
            self.register_buffer("samples_seen", torch.zeros((), dtype=torch.int64))
        self.hidden = nn.ModuleList(nn.Linear(read, hidden_dim) for _ in range(gates))
        self.output = nn.Linear(direct + hidden_dim, 1)
        if self.inputs == "predictions":
            self._start_as_margin()

    @property
    def inputs(self) -> Reading:
        """What the gates read, for which their layers were made."""
        return self._inputs

    @property
    def top_k(self) -> int:
        """How many of the largest mean logits a gate reads, for which its layers were made."""
        return self._top_k

    @classmethod
    def for_model(cls, model: SizedModel, **options: Any) -> Self:
        """Build the router that fits a wrapped model, on the model's device.

        Args:
            model: a ``RIDEWrapper``, or anything with ``feature_dim``, ``num_experts`` and
                ``num_classes``.
            **options: ``inputs``, ``top_k`` and ``hidden_dim``.
        """
        missing = [name for name in SizedModel.__annotations__ if not hasattr(model, name)]
        if missing:
            refuse("model", f"a RIDEWrapper, or a model that has {', '.join(missing)}", model)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        with nullcontext() if parameter is None else parameter.device:
            return cls(
                model.feature_dim, model.num_experts, num_classes=model.num_classes, **options
            )

    def forward(self, inputs: RouterInputs | tuple[Tensor, Tensor]) -> Tensor:
        """Gate logits for a batch on which every expert has run; the form that training needs.

        In training mode the mean and deviation by which inputs are standardised take this batch
        in, whatever its size; `gate` only reads them.

        Args:
            inputs: ``(expert_logits [B, E, C], expert_features [B, E, D])``, for example
                ``model.router_inputs(x)``.

        Returns:
            ``[B, E-1]``, the logit of "one more expert is needed" after each expert but the last.

        Raises:
            ArgumentError: a shape does not fit the router, or (checked on the CPU only) a value
                is NaN.
        """
        logits, features = _checked(inputs, self)
        means = running_means(float32_or_better(logits))[:, :-1]
        if self.training and self.inputs == "predictions" and len(logits):
            self._take_in(means)
        columns = [
            self.gate(index, means[:, index], features[:, index])
            for index in range(self.num_experts - 1)
        ]
        return torch.stack(columns, dim=1)

    def gate(self, index: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """One gate, for the rows that have reached it; the form that inference needs.

        Args:
            index: which gate, 0 to E-2: the number of the expert that ran last.
            mean_logits: ``[b, C]``, mean of the logits of experts 0 to ``index``.
            features: ``[b, D]``, pooled feature of expert ``index``.

        Returns:
            ``[b]``, logit of "one more expert is needed".

        Raises:
            ArgumentError: (on the CPU only) a value is NaN.
        """
        index = check_integer(index, "index", 0, self.num_experts - 2)
        check_floating(mean_logits, "mean_logits", "b", self.num_classes, advice=_ADVICE)
        if self.inputs == "paper":  # the other does not read them
            check_floating(features, "features", len(mean_logits), self.feature_dim, advice=_ADVICE)
        with without_autocast(mean_logits):
            read = self._paper if self.inputs == "paper" else self._predictions
            direct, indirect = read(index, float32_or_better(mean_logits), features)
            weight = self.output.weight
            # Layers that something has quantized take float32, whatever their weight is.
            floating = isinstance(weight, Tensor) and weight.is_floating_point()
            dtype = weight.dtype if floating else torch.float32
            hidden = F.relu(self.hidden[index](indirect.to(dtype)))
            logit: Tensor = self.output(torch.cat((direct.to(dtype), hidden), dim=1)).squeeze(1)
        # What is no number anywhere in what a gate reads reaches its output.
        if not is_finite(logit):
            check_predictions(mean_logits, "the experts' logits")
            check_numbers(features, "the experts' features")
            raise ArgumentError(
                "Expected the router's parameters to be finite, but its gate returned NaN for "
                "finite logits and features. Stage two has probably diverged: lower its learning "
                "rate."
            )
        return logit

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Mean and deviation of all samples: in half precision they would not move any more.
        keeping_digits(self, lambda: super(ExpertRouter, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Somebody's hooks run in it, which may rename entries; the layers load theirs only later.
        super()._load_from_state_dict(state_dict, prefix, *rest)
        refuse_plain_state(state_dict, prefix, self)

    def extra_repr(self) -> str:
        """What was chosen, for ``repr``."""
        return (
            f"num_experts={self.num_experts}, num_classes={self.num_classes}, "
            f"inputs={self.inputs!r}, top_k={self.top_k}"
        )

    def _paper(self, index: int, mean_logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the output layer as it is, and what goes into the hidden one."""
        top = mean_logits.topk(self.top_k, dim=1).values
        # Normalising squares its input, which overflows in half precision.
        direction = F.normalize(float32_or_better(features), dim=1)
        return top.masked_fill(top == -torch.inf, 0.0), direction

    def _predictions(
        self, index: int, mean_logits: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        statistics, likely, where = _describe(mean_logits, self.top_k)
        standard = (statistics - self.input_mean[index]) * (
            self.input_variance[index] + 1e-6
        ).rsqrt()
        vectors = self.classes(where)
        meant = (likely.to(vectors.dtype)[..., None] * vectors).sum(dim=1)
        margin = statistics[:, -2:-1]  # the last but one of `_describe`
        return margin, torch.cat((standard.to(vectors.dtype), meant), dim=1)

    @torch.no_grad()
    def _start_as_margin(self) -> None:
        # A gate that starts at random has to learn the margin first, and never quite does: with
        # 1,000 held-out images it was 0.35 points behind an exit by the margin, now 0.1.
        self.output.weight.zero_()
        self.output.weight[:, 0] = -6.0
        self.output.bias.fill_(3.0)

    @torch.no_grad()
    def _take_in(self, means: Tensor) -> None:
        """Join the mean and variance of these samples to those of the samples seen before."""
        size = len(means)
        for index in range(self.num_experts - 1):
            new = _describe(means[:, index], self.top_k)[0].to(self.input_mean.dtype)
            share = size / (self.samples_seen.float() + size)
            away = new.mean(dim=0) - self.input_mean[index]
            variance = new.var(dim=0, correction=0) - self.input_variance[index]
            self.input_variance[index] += share * variance + share * (1 - share) * away.square()
            self.input_mean[index] += share * away
        self.samples_seen += size


def _describe(mean_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics ``[b, k + 3]``; the ``k`` largest probabilities and their classes, ``[b, k]``."""
    top, where = mean_logits.topk(top_k, dim=1)
    masked = mean_logits == -torch.inf
    centre = mean_logits.masked_fill(masked, 0.0).sum(dim=1, keepdim=True)
    centre = centre / (~masked).sum(dim=1, keepdim=True).clamp_min(1)
    probabilities = mean_logits.softmax(dim=1)
    likely = probabilities.gather(1, where)
    second = likely[:, 1:2] if top_k > 1 else 1 - likely
    above = (top - centre).clamp(-_LARGEST, _LARGEST)
    statistics = (
        above.masked_fill(top == -torch.inf, 0.0),
        likely[:, :1],
        likely[:, :1] - second,
        torch.special.entr(probabilities).sum(dim=1, keepdim=True),
    )
    return torch.cat(statistics, dim=1), likely, where


def _checked(inputs: tuple[Tensor, Tensor], router: ExpertRouter) -> tuple[Tensor, Tensor]:
    if not (isinstance(inputs, tuple | list) and len(inputs) == 2):
        raise ArgumentError(
            "Expected argument `inputs` to be (expert_logits [B, E, C], expert_features "
            f"[B, E, D]), but got {type(inputs).__name__}. Pass `model.router_inputs(x)`."
        )
    logits, features = inputs
    if isinstance(features, Tensor) and features.is_complex():
        if router.inputs == "paper":
            raise ArgumentError(
                "Expected argument `expert_features` to be real numbers, but got a tensor of dtype "
                f"{features.dtype}, as of a classifier that computes with complex numbers. Leave "
                "out `inputs='paper'`: the default router reads the logits alone."
            )
        features = features.real  # of which nothing is read
    for name, value, size in (
        ("expert_logits", logits, router.num_classes),
        ("expert_features", features, router.feature_dim),
    ):
        check_floating(value, name, "B", router.num_experts, size, advice=_ADVICE)
    if len(logits) != len(features):
        raise ArgumentError(
            "Expected `expert_logits` and `expert_features` to hold the same batch, but got "
            f"{len(logits)} and {len(features)} rows."
        )
    check_predictions(logits, "the experts' logits")
    check_numbers(features, "the experts' features")
    return logits, features
