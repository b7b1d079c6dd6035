"""The expert router: does this sample need one more expert? (paper, section 3, stage two)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ride_plugin._checks import check_numbers, check_predictions, is_finite
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import float32_or_better
from ride_plugin._output import RouterInputs

if TYPE_CHECKING:
    from typing import Self


class SizedModel(Protocol):
    """What the router needs to know of a wrapped model."""

    num_experts: int
    num_classes: int
    feature_dim: int


class ExpertRouter(nn.Module):
    r"""Decides after each expert but the last whether a sample needs one more.

    Gate $i$, for $i = 0 \dots E-2$, reads what is known once experts $0 \dots i$ have run: the
    $k$ largest values of their mean logits, and expert $i$'s pooled feature $f_i$,

    $$g_i = w^\top [\mathrm{top}_k(\tfrac{1}{i+1}\textstyle\sum_{j \le i} z_j) \,;\,
    \mathrm{relu}(W_i f_i / \|f_i\| + b_i)] + b.$$

    $W_i, b_i$ belong to the gate; $w, b$ are shared by all gates. The probability that one more
    expert is needed is $\sigma(g_i)$. (Paper: section 3, "Routing"; the layout is the authors'
    code's.) Differs from the paper's code: $k$ is at most the number of classes, an all-zero
    feature stays zero instead of becoming NaN, and a class masked by a logit of $-\infty$ enters
    as 0.

    Args:
        feature_dim: $D$, size of an expert's pooled feature (the input of its classifier).
        num_experts: $E$, at least 2.
        num_classes: $C$.
        top_k: how many of the largest mean logits a gate reads; the authors use 30.
        hidden_dim: width of each gate's hidden layer; the authors use 16.

    Raises:
        ArgumentError: a size is not positive, or ``num_experts`` is below 2.

    Example:
        >>> router = ExpertRouter(64, 3, num_classes=10)
        >>> gate_logits = router((torch.randn(4, 3, 10), torch.randn(4, 3, 64)))
        >>> tuple(gate_logits.shape)
        (4, 2)
    """

    def __init__(
        self,
        feature_dim: int,
        num_experts: int,
        *,
        num_classes: int,
        top_k: int = 30,
        hidden_dim: int = 16,
    ) -> None:
        super().__init__()
        sizes = {
            "feature_dim": feature_dim,
            "num_classes": num_classes,
            "top_k": top_k,
            "hidden_dim": hidden_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ArgumentError(f"Expected argument `{name}` to be at least 1, but got {size}.")
        if num_experts < 2:
            raise ArgumentError(
                f"Expected argument `num_experts` to be at least 2, but got {num_experts}. With "
                "one expert there is nothing to route: use the model's output as it is."
            )
        self.feature_dim = feature_dim
        self.num_experts = num_experts
        self.num_classes = num_classes
        self.top_k = min(top_k, num_classes)
        self.hidden = nn.ModuleList(
            nn.Linear(feature_dim, hidden_dim) for _ in range(num_experts - 1)
        )
        self.output = nn.Linear(self.top_k + hidden_dim, 1)

    @classmethod
    def for_model(cls, model: SizedModel, **options: Any) -> Self:
        """Build the router that fits a wrapped model, on the model's device.

        Args:
            model: a ``RIDEWrapper``, or anything with ``feature_dim``, ``num_experts`` and
                ``num_classes``.
            **options: ``top_k`` and ``hidden_dim``.
        """
        router = cls(model.feature_dim, model.num_experts, num_classes=model.num_classes, **options)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        return router if parameter is None else router.to(parameter.device)

    def forward(self, inputs: RouterInputs | tuple[Tensor, Tensor]) -> Tensor:
        """Gate logits for a batch on which every expert has run; the form that training needs.

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
        sums = float32_or_better(logits).cumsum(dim=1)
        columns = [
            self.gate(index, sums[:, index] / (index + 1), features[:, index])
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
        # Normalising squares its input, which overflows in half precision.
        with torch.autocast(mean_logits.device.type, enabled=False):
            top = torch.topk(float32_or_better(mean_logits), self.top_k, dim=1).values
            top = top.masked_fill(top == -torch.inf, 0.0)
            direction = F.normalize(float32_or_better(features), dim=1)
            dtype = self.output.weight.dtype
            hidden = F.relu(self.hidden[index](direction.to(dtype)))
            logit: Tensor = self.output(torch.cat((top.to(dtype), hidden), dim=1)).squeeze(1)
        # What is no number anywhere in a gate's input reaches its output.
        if not is_finite(logit):
            check_predictions(mean_logits, "the experts' logits")
            check_numbers(features, "the experts' features")
            raise ArgumentError(
                "Expected the router's parameters to be finite, but its gate returned NaN for "
                "finite logits and features. Stage two has probably diverged: lower its learning "
                "rate."
            )
        return logit

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return f"num_experts={self.num_experts}, num_classes={self.num_classes}, top_k={self.top_k}"


def _checked(inputs: tuple[Tensor, Tensor], router: ExpertRouter) -> tuple[Tensor, Tensor]:
    if not (isinstance(inputs, tuple) and len(inputs) == 2):
        raise ArgumentError(
            "Expected argument `inputs` to be (expert_logits [B, E, C], expert_features "
            f"[B, E, D]), but got {type(inputs).__name__}. Pass `model.router_inputs(x)`."
        )
    logits, features = inputs
    for name, value, size in (
        ("expert_logits", logits, router.num_classes),
        ("expert_features", features, router.feature_dim),
    ):
        if value.dim() != 3 or value.shape[1:] != (router.num_experts, size):
            raise ArgumentError(
                f"Expected argument `{name}` to have shape [B, {router.num_experts}, {size}], but "
                f"got {list(value.shape)}. Build the router with `ExpertRouter.for_model(model)`."
            )
    if len(logits) != len(features):
        raise ArgumentError(
            "Expected `expert_logits` and `expert_features` to hold the same batch, but got "
            f"{len(logits)} and {len(features)} rows."
        )
    check_predictions(logits, "the experts' logits")
    check_numbers(features, "the experts' features")
    return logits, features
