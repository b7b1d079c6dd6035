r"""Every equation of RIDE as a pure function of tensors; the modules only hold its constants.

Shapes: B samples, E experts, C classes. Nothing here keeps state or draws random numbers, and what
a training step calls reads no value back from an accelerator. Half precision is computed in
float32, float64 in float64, and no operation used is one that autocast would lower. Every function
raises `ArgumentError` for an argument of another kind, shape or range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ride_plugin._checks import (
    ClassCounts,
    check_bool,
    check_choice,
    check_class_counts,
    check_classes,
    check_floating,
    check_least,
    check_number,
    check_numbers,
    check_predictions,
    check_target,
    check_temperature,
    check_temperatures,
    may_read,
    refuse,
)
from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import compare, float32_or_better, inverse_of, memory_of, with_gradient

__all__ = [
    "Form",
    "class_balance",
    "class_temperatures",
    "distillation_kl",
    "kl_from_mean",
    "kl_from_reference",
    "mean_logits",
    "pairwise_kl",
    "routing_loss",
    "routing_targets",
    "running_means",
    "sample_temperatures",
]

Form: TypeAlias = Literal["paper", "official"]
"""Which text is followed where the paper and its authors' code differ."""


_MASKED = -1e30  # a logit below it is -inf, or the smallest number of a dtype in its place


def mean_logits(experts: Tensor) -> Tensor:
    """Ensemble prediction: mean over experts, ``[B, E, C]`` -> ``[B, C]`` (paper, section 3)."""
    return torch.mean(_of_experts(experts, "experts"), dim=1)


def running_means(experts: Tensor) -> Tensor:
    """Mean of the first 1, 2, ... E experts' logits, ``[B, E, C] -> [B, E, C]``.

    Added one by one, as early exit adds them, so that both give the same bits. In half precision
    the sum is one of float32, and each mean is rounded once, as `mean_logits` does it.

    Example:
        >>> running_means(torch.tensor([[[2.0], [4.0], [0.0]]])).flatten().tolist()
        [2.0, 3.0, 2.0]
    """
    first = _of_experts(experts, "experts")[:, 0]
    total, means = float32_or_better(first), [first]
    for index in range(1, experts.shape[1]):
        total = total + experts[:, index]
        means.append((total / (index + 1)).to(experts.dtype))
    return torch.stack(means, dim=1)


def class_balance(class_counts: ClassCounts, gamma: float) -> Tensor:
    r"""Return how over-represented each class is: one when all classes are equally frequent.

    $$\psi_k = \gamma\, \frac{n_k}{\frac1C \sum_c n_c} + (1 - \gamma).$$

    (Paper, section 3, distribution-aware diversity loss.)

    Args:
        class_counts: ``[C]``, training samples of each class.
        gamma: share of the imbalance that is taken over, between 0 and 1.

    Returns:
        ``[C]``, with mean one: float32, or float64 for a tensor of float64; on the device of the
        counts, if they are a tensor. They are constants, to which no gradient flows.

    Example:
        >>> class_balance(torch.tensor([30.0, 10.0, 20.0]), gamma=0.1)
        tensor([1.0500, 0.9500, 1.0000])
    """
    checked, gamma = check_class_counts(class_counts), check_number(gamma, "gamma", 0, 1)
    counts = float32_or_better(
        class_counts.detach() if isinstance(class_counts, Tensor) else checked.float()
    )
    return gamma * counts / counts.mean() + (1 - gamma)


def class_temperatures(
    class_counts: ClassCounts, *, eta: float, gamma: float, form: Form
) -> Tensor:
    r"""Return the temperature of each class: highest, $\eta$, for the most frequent one.

    $$T_k = \eta\, \psi_k + \eta\, (1 - \max_c \psi_c) \quad\text{(paper, section 3)}, \qquad
    T_k = \eta\, \psi_k / \max_c \psi_c \quad\text{(official)}.$$

    Args:
        class_counts: ``[C]``, training samples of each class.
        eta: the base temperature.
        gamma: see `class_balance`.
        form: ``"paper"`` shifts the largest temperature to eta; ``"official"`` (the authors' code)
            divides by it.

    Returns:
        ``[C]``, positive.

    Raises:
        ArgumentError: a temperature would not be positive, which a large gamma can do in the
            paper's form; or an argument is out of range.

    Example:
        >>> class_temperatures(torch.tensor([30.0, 10.0, 20.0]), eta=1.0, gamma=0.1, form="paper")
        tensor([1.0000, 0.9000, 0.9500])
    """
    eta = check_number(eta, "eta", 0, open_low=True)
    form = check_choice(form, "form", get_args(Form))
    psi = class_balance(class_counts, gamma)
    if form == "official":
        return eta * psi / psi.max()
    temperatures = eta * psi + eta * (1 - psi.max())
    lowest = float(temperatures.min())
    if not lowest > 0:
        limit = gamma / float(psi.max() - psi.min())
        raise ArgumentError(
            "Expected argument `gamma` to keep every temperature positive, but got "
            f"gamma={gamma:g}, with which the rarest class has temperature {lowest:.3g}. For "
            f"these class counts it must be below {limit:.3g}."
        )
    return temperatures


def sample_temperatures(temperature: Tensor, target: Tensor) -> Tensor:
    r"""Return the temperature of each sample: that of its class.

    For probabilities $t$ (mixup, label smoothing) it is the expectation $\sum_c t_c T_c$, which
    equals the hard case at one-hot rows. (The paper knows hard labels only.)

    Args:
        temperature: ``[C]``, positive (checked on the CPU).
        target: class indices int64 ``[B]``, or probabilities ``[B, C]``.

    Returns:
        ``[B]``, float32 or float64.

    Example:
        >>> sample_temperatures(torch.tensor([1.0, 0.8]), torch.tensor([0, 1, 1]))
        tensor([1.0000, 0.8000, 0.8000])
    """
    temperature = float32_or_better(check_temperatures(temperature, "C"))
    classes = temperature.shape[0]
    batch = target.shape[0] if isinstance(target, Tensor) and target.dim() else 0
    target = check_target(target, batch, classes, device=temperature.device)
    if target.is_floating_point():
        return (target * temperature).sum(dim=1)  # a matrix product would be lowered by autocast
    try:
        return temperature.gather(0, target)  # gather: negative indices raise, they do not wrap
    except (IndexError, RuntimeError):
        check_classes(target, "target", classes)
        raise


def pairwise_kl(
    expert_logits: Tensor, temperature: Tensor | float = 1.0, *, detach_others: bool = True
) -> Tensor:
    r"""Sum over experts of the mean divergence from each other expert, for each sample.

    With $p_i = \mathrm{softmax}(z_i / T)$,

    $$D = \frac{1}{E-1} \sum_i \sum_{j \ne i} \mathrm{KL}(p_i \,\|\, p_j).$$

    (Paper, section 3, distribution-aware diversity loss; the loss is $-\lambda D$, summed over
    experts.) It is computed without a loop over pairs: with $q$ the normalised geometric mean of
    the experts and $h_i = \frac12(\log p_i - \log q)$,

    $$\sum_i \sum_{j \ne i} \mathrm{KL}(p_i \,\|\, p_j)
    = 2E \sum_i \sum_c (p_i + q)\, h_i \tanh h_i,$$

    a sum of terms that are never negative. With the other experts held constant, expert i's
    gradient is $\frac{2E}{(E-1)\,T}\, p_i\, (h_i - \langle p_i, h_i \rangle)$.

    Args:
        expert_logits: ``[B, E, C]``. A class may be masked with -inf, in all experts: masked in
            some only it has no finite divergence, which is an error on the CPU.
        temperature: a number, or ``[B]``, one for each sample, all positive; held constant. A
            tensor's values are checked on the CPU only: to read them would stall a device.
        detach_others: each expert minimises its own divergence and takes the others as given,
            which is how the paper states the loss. With False the gradient also reaches $p_j$;
            below a minus sign that is unbounded and was measured to diverge.

    Returns:
        ``[B]``, float32 or float64; zero for a single expert.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> pairwise_kl(logits)  # both pairs: 2 tanh(1) each
        tensor([3.0464])
    """
    logits = float32_or_better(_of_experts(expert_logits, "expert_logits"))
    temperature = check_temperature(temperature, len(logits))
    detach_others = check_bool(detach_others, "detach_others")
    inverse = inverse_of(temperature, logits).expand(len(logits))[:, None, None]
    _check_masks(logits, "all experts mask", lambda masked: masked.all(dim=1))
    num_experts = logits.shape[1]
    factor = num_experts / max(num_experts - 1, 1)

    def of_samples(logits: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        p, q, h = compare(logits, logits.mean(dim=1, keepdim=True), inverse)
        # Products go into one buffer: at these sizes fresh memory costs more than arithmetic.
        work = h.tanh().mul_(h).mul_(p + q)
        value = work.sum(dim=(1, 2)).mul_(2 * factor)
        mean_h = torch.mul(p, h, out=memory_of(work)).sum(-1, keepdim=True)
        if detach_others:
            gradient = h.sub_(mean_h).mul_(p)
        else:  # half of p_i - mean_j p_j comes on top
            gradient = h.sub_(mean_h.sub_(0.5)).mul_(p)
            gradient.sub_(p.sum(dim=1, keepdim=True), alpha=0.5 / num_experts)
        return value, gradient.mul_(inverse * (2 * factor))

    return with_gradient(of_samples, logits, inverse)


def kl_from_reference(
    expert_logits: Tensor, reference_logits: Tensor, temperature: Tensor | float = 1.0
) -> Tensor:
    r"""Sum over experts of the divergence from a fixed reference to the expert, for each sample.

    With $q = \mathrm{softmax}(r / T)$ held constant and $h_i = \frac12 (\log p_i - \log q)$,

    $$\sum_i \mathrm{KL}(q \,\|\, p_i)
    = \sum_i \sum_c (p_i + q)\, \bigl(h_i \tanh h_i - (h_i - \tanh h_i)\bigr).$$

    Args:
        expert_logits: ``[B, E, C]``. A class that an expert masks with -inf is masked in the
            reference, too, or the divergence is not finite, which is an error on the CPU.
        reference_logits: ``[B, C]``; no gradient reaches it.
        temperature: a number, or ``[C]``, one for each class, dividing the logits across classes
            (as in the authors' code); held constant.

    Returns:
        ``[B]``, float32 or float64.

    Example:
        >>> kl_from_reference(torch.zeros(1, 3, 2), torch.tensor([[1.0, 1.0]]))
        tensor([0.])
    """
    logits = float32_or_better(_of_experts(expert_logits, "expert_logits"))
    batch, _, classes = logits.shape
    check_floating(
        reference_logits,
        "reference_logits",
        batch,
        classes,
        advice="Both must come from the same batch and know the same classes.",
    )
    reference = reference_logits.detach().to(logits.dtype)
    _check_masks(logits, "the reference masks", lambda _: reference < _MASKED)
    return _from_reference(logits, reference, temperature)


def kl_from_mean(expert_logits: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    r"""Divergence of the experts from their ensemble, as the authors' code has it.

    $$D = \bar T^2 \sum_i \mathrm{KL}(q \,\|\, p_i), \qquad q = \mathrm{softmax}(\bar z / T),$$

    with the ensemble's logits $\bar z$ held constant, the temperature of each *class* dividing that
    class's logit, and $\bar T$ the mean temperature. (Differs from the paper: linear instead of
    quadratic in E, the arguments of KL exchanged, the label not used.)

    Args:
        expert_logits: ``[B, E, C]``.
        temperature: a number, or ``[C]``, one for each class, held constant.

    Returns:
        ``[B]``, float32 or float64.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
        >>> kl_from_mean(logits)  # 2 log cosh(1)
        tensor([0.8676])
    """
    logits = float32_or_better(_of_experts(expert_logits, "expert_logits"))
    divergence = _from_reference(logits, mean_logits(logits), temperature)
    if not isinstance(temperature, Tensor):
        return float(temperature) ** 2 * divergence
    return float32_or_better(temperature.detach()).mean() ** 2 * divergence


def distillation_kl(
    expert_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.5
) -> Tensor:
    r"""Sum over experts of the knowledge-distillation divergence from a teacher.

    $$D = T^2 \sum_i
    \mathrm{KL}\bigl(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(z_i / T)\bigr).$$

    Args:
        expert_logits: the student's ``[B, E, C]``.
        teacher_logits: ``[B, C]``, held constant.
        temperature: the same for teacher and student, and for all classes.

    Returns:
        ``[B]``, float32 or float64.

    Raises:
        ArgumentError: the shapes of student and teacher do not fit.

    Example:
        >>> distillation_kl(torch.zeros(1, 2, 4), torch.zeros(1, 4))
        tensor([0.])
    """
    temperature = check_number(temperature, "temperature", 0, open_low=True)
    batch, _, classes = _of_experts(expert_logits, "expert_logits").shape
    check_floating(
        teacher_logits,
        "teacher_logits",
        batch,
        classes,
        advice="Teacher and student must see the same batch and know the same classes.",
    )
    return temperature**2 * kl_from_reference(expert_logits, teacher_logits, temperature)


def routing_targets(expert_logits: Tensor, target: Tensor) -> Tensor:
    r"""Tell which samples would gain from one more expert.

    With $\hat y_i = \arg\max_c \sum_{j \le i} z_{jc}$ the prediction of the first $i + 1$ experts,

    $$y_i = [\hat y_i \ne y] \cdot [\exists\, k > i: \hat y_k = y], \qquad i = 0 \dots E-2.$$

    (Paper, section 3, "Routing": wrong so far, and right with more experts.)

    Args:
        expert_logits: ``[B, E, C]``.
        target: class indices ``[B]``, or probabilities ``[B, C]``, of which the most probable
            class counts.

    Returns:
        bool ``[B, E-1]``.

    Raises:
        ArgumentError: a shape does not fit, or (on the CPU only) an index is out of range.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [3.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> routing_targets(logits, torch.tensor([0, 0]))
        tensor([[ True],
                [False]])
    """
    classes = _class_indices(target, expert_logits)
    check_predictions(expert_logits, "the experts' logits")
    right = (
        float32_or_better(expert_logits.detach()).cumsum(dim=1).argmax(dim=2) == classes[:, None]
    )
    # cummax does not take booleans; from the back it says "right here or at some later expert".
    right_later = right.int().flip(1).cummax(dim=1).values.flip(1).bool()
    return ~right[:, :-1] & right_later[:, 1:]


def routing_loss(
    gate_logits: Tensor,
    targets: Tensor,
    pos_weight: float = 100.0,
    neg_weight: float = 1.0,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Weighted binary cross entropy of the gates, averaged over samples and gates.

    $$L = \frac{1}{B(E-1)} \sum_{b,i} a_b \bigl[-w_p\, y_{bi} \log\sigma(g_{bi})
    - w_n\, (1 - y_{bi}) \log(1 - \sigma(g_{bi}))\bigr].$$

    (Paper, section 3, "Routing"; averaged over the gates, as in the authors' code.)

    Args:
        gate_logits: ``[B, E-1]``; half precision is computed in float32.
        targets: bool ``[B, E-1]``, from `routing_targets`.
        pos_weight: $w_p$, weight of samples that need one more expert.
        neg_weight: $w_n$, weight of the others.
        weight: $a_b$, ``[B]``, of each sample; None for one each.

    Returns:
        scalar, float32 or float64.

    Example:
        >>> routing_loss(torch.zeros(1, 2), torch.tensor([[True, False]]))
        tensor(35.0039)
    """
    pos_weight = check_number(pos_weight, "pos_weight", 0)
    neg_weight = check_number(neg_weight, "neg_weight", 0)
    if not isinstance(targets, Tensor) or targets.dtype != torch.bool or targets.dim() != 2:
        refuse("targets", "a bool tensor [B, E-1]", targets, "routing_targets returns it.")
    if not targets.numel():
        refuse("targets", "those of at least one sample and gate", targets)
    check_floating(
        gate_logits,
        "gate_logits",
        *targets.shape,
        advice="Pass the router's output for the same batch.",
    )
    check_numbers(gate_logits, "the gates' logits")
    wide = float32_or_better(gate_logits)
    positive = -pos_weight * F.logsigmoid(wide)
    negative = -neg_weight * F.logsigmoid(-wide)
    loss = torch.where(targets, positive, negative)
    if weight is not None:
        check_least(check_floating(weight, "weight", len(targets)), "weight", 0)
        loss = loss * weight[:, None]
    return loss.mean()


def _from_reference(logits: Tensor, reference: Tensor, temperature: Tensor | float) -> Tensor:
    """What `kl_from_reference` returns, of logits of one dtype; the mean masks what experts do."""
    inverse = inverse_of(check_temperature(temperature, logits.shape[2]), logits)

    def of_samples(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        p, q, h = compare(logits, reference, inverse)
        # Beyond h = 40 the bracket is one; unclamped, the h of a masked class would cancel it.
        h = torch.clamp(h, max=40.0, out=memory_of(h))
        tanh = h.tanh()
        # Exact where h is small, so h = tanh - rest keeps it all.
        rest = torch.sub(tanh, h, out=memory_of(h))
        bracket = torch.addcmul(rest, rest, tanh, value=-1, out=memory_of(rest))
        bracket = torch.addcmul(bracket, tanh, tanh, out=memory_of(bracket))
        value = bracket.mul_(torch.add(p, q, out=memory_of(tanh))).sum(dim=(1, 2))
        return value, p.sub_(q).mul_(inverse)

    return with_gradient(of_samples, logits, reference[:, None])


def _of_experts(value: Tensor, name: str) -> Tensor:
    """Return floating-point ``[B, E, C]``; the mean of no experts would be NaN."""
    experts = check_floating(value, name, "B", "E", "C")
    if not experts.shape[1] or not experts.shape[2]:
        refuse(name, "that of at least one expert and class, [B, E, C]", experts)
    return experts


def _check_masks(logits: Tensor, who: str, allowed: Callable[[Tensor], Tensor]) -> None:
    """Raise if an expert masks a class ``[B, C]`` that is not allowed, on the CPU only."""
    logits = logits.detach()
    if not logits.numel() or not may_read(logits) or float(logits.amin()) >= _MASKED:
        return
    masked = logits < _MASKED
    wrong = (masked.any(dim=1) & ~allowed(masked)).nonzero()
    if len(wrong):
        sample, which = wrong[0].tolist()
        raise ArgumentError(
            f"Expected argument `expert_logits` to mask only classes that {who}, but some expert "
            f"masks class {which} of sample {sample} (a logit of -inf, or near to the smallest "
            "number), so that the divergence is infinite. Mask the same classes everywhere, or "
            "none."
        )


def _class_indices(target: Tensor, experts: Tensor) -> Tensor:
    batch, num_experts, num_classes = _of_experts(experts, "expert_logits").shape
    if num_experts < 2:
        refuse("expert_logits", "those of at least two experts, [B, E, C]", experts)
    target = check_target(target, batch, num_classes, device=experts.device)
    # On an accelerator an index out of range equals no prediction, so its sample counts as one
    # that nothing helps.
    check_classes(target, "target", num_classes)
    return target.argmax(dim=1) if target.is_floating_point() else target
