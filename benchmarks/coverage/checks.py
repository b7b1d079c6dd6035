"""The checks of the coverage table: each compares a wrapped model with the backbone itself."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.inputs import Inputs, other_sizes, redrawn, rows_of
from ride_plugin import RIDEWrapper, cost_report, expert_logits
from ride_plugin._split._probe import clone_module
from ride_plugin._split._tree import logits_in, map_tensors

_BATCH = 3


class Failed(Exception):
    """The wrapped model is not what it must be."""


class NotApplicable(Exception):
    """The backbone itself cannot do what the check asks for."""


class Subject:
    """A backbone and its wrapped forms, built when first needed."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        torch.manual_seed(0)
        self.backbone = architecture.build()

    @cached_property
    def one(self) -> RIDEWrapper:
        """With one expert: the backbone itself."""
        return RIDEWrapper(self.backbone, num_experts=1)

    @cached_property
    def two(self) -> RIDEWrapper:
        """With two experts that differ."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # parameters that are not redrawn
            return RIDEWrapper(self.backbone, num_experts=2)

    @cached_property
    def inputs(self) -> Inputs:
        """A batch that the build has not seen."""
        return redrawn(self.one.example_input(_BATCH))

    def plain(self, training: bool = False) -> nn.Module:
        """A fresh copy of the backbone."""
        return clone_module(self.backbone).train(training)

    def expert_as_backbone(self, index: int) -> nn.Module:
        """The backbone with the weights of the trunk and of one expert: the hand-made split."""
        module = self.plain()
        ours: dict[str, Tensor] = {}
        for part in (self.two.trunk, self.two.experts[index]):
            ours.update(part.named_parameters(remove_duplicate=False))
            ours.update(part.named_buffers(remove_duplicate=False))
        theirs = dict(module.named_parameters(remove_duplicate=False))
        theirs.update(module.named_buffers(remove_duplicate=False))
        if missing := set(theirs) - set(ours):
            raise Failed(f"not in trunk or expert: {sorted(missing)[:3]}")
        with torch.no_grad():
            for name, tensor in theirs.items():
                if not torch.equal(tensor, ours[name]):
                    tensor.copy_(ours[name])
        return module


def run(module: Any, inputs: Inputs, seed: int = 0) -> Tensor:
    """Logits of a module on inputs."""
    torch.manual_seed(seed)
    logits = logits_in(module(*inputs[0], **inputs[1]))
    if logits is None:
        raise Failed("no logits")
    return logits


def wraps(subject: Subject) -> None:
    """Nothing but `num_experts` is passed; the backbone and the random state stay untouched."""
    before = copy.deepcopy(subject.backbone.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    subject.one  # noqa: B018
    if not torch.equal(state, torch.get_rng_state()):
        raise Failed("building with one expert consumed random numbers")
    for name, tensor in subject.backbone.state_dict().items():
        if not torch.equal(tensor.nan_to_num(), before[name].nan_to_num()):
            raise Failed(f"building changed the backbone's `{name}`")
    subject.two  # noqa: B018


def evaluation(subject: Subject) -> None:
    """One expert is the backbone to the bit in evaluation; so is each of two with its weights."""
    inputs = subject.inputs
    with torch.no_grad():
        got = run(subject.one.eval(), inputs)
        require_close(got, run(subject.plain(), inputs), "one expert")
        require_equal(got, run(unfused(subject.plain()), inputs), "one expert")
        each = expert_logits(run_wrapped(subject.two.eval(), inputs))
        for index in range(2):
            expected = run(subject.expert_as_backbone(index), inputs)
            require_close(each[:, index], expected, f"expert {index}")


def training(subject: Subject) -> None:
    """One expert is the backbone to the bit in training: outputs, buffers, random state."""
    plain = subject.plain(training=True)
    model = copy.deepcopy(subject.one).train()
    with torch.no_grad():
        for step in range(2):
            try:
                expected = run(plain, subject.inputs, step)
            except Exception as error:
                raise NotApplicable(f"the backbone does not train on its input: {error}") from error
            state = torch.get_rng_state()
            require_equal(run(model, subject.inputs, step), expected, f"step {step}")
            if not torch.equal(state, torch.get_rng_state()):
                raise Failed("random state after the forward")
    theirs = dict(plain.named_buffers(remove_duplicate=False))
    ours: dict[str, Tensor] = {}
    for part in (model.trunk, model.experts[0]):
        ours.update(part.named_buffers(remove_duplicate=False))
    for name, buffer in theirs.items():
        require_equal(ours[name], buffer, f"buffer {name}")


def trunk_once(subject: Subject) -> None:
    """Every layer of the trunk is called as often as in the backbone, whatever the experts."""
    expected = _calls(subject.plain(), lambda module: run(module, subject.inputs))
    model = subject.two.eval()
    args, kwargs = subject.inputs
    before_fork = _calls(model, lambda module: module.run_trunk(*args, **kwargs))
    got = _calls(model, lambda module: run_wrapped(module, subject.inputs))
    for prefix in ("trunk.", "experts.0.", "experts.1."):
        owner = model.get_submodule(prefix[:-1])
        for name, module in owner.named_modules():
            owns = any(True for _ in module.parameters(recurse=False))
            leaf = not any(True for _ in module.children())
            if not (leaf and owns):
                continue
            times = expected[name]
            if prefix == "trunk.":  # a layer that is called again after the fork runs per expert
                times += times - before_fork[prefix + name]
            if got[prefix + name] != times:
                raise Failed(f"{prefix}{name}: {got[prefix + name]} calls for {times}")


def gradients_one(subject: Subject) -> None:
    """With one expert, the gradients in training are the backbone's own."""
    plain = subject.plain(training=True)
    model = copy.deepcopy(subject.one).train()
    try:
        expected = _gradients(plain, lambda: run(plain, subject.inputs))
    except Exception as error:
        raise NotApplicable(f"the backbone does not train on its input: {error}") from error
    got = _gradients(model, lambda: run(model, subject.inputs))
    require_gradients(_merged(got), expected)


def gradients_two(subject: Subject) -> None:
    """With two experts, the trunk's gradient is the sum over two backbones with their weights."""
    model = copy.deepcopy(subject.two).eval()
    got = _gradients(model, lambda: expert_logits(run_wrapped(model, subject.inputs)))
    plains = [subject.expert_as_backbone(index) for index in range(2)]
    each = [_gradients(p, lambda p=p: run(p, subject.inputs)) for p in plains]
    for index, expected in enumerate(each):
        ours = {k: v for k, v in got.items() if k.startswith(f"experts.{index}.")}
        require_gradients(_merged(ours), expected, subset=True)
    ours = {k: v for k, v in got.items() if k.startswith("trunk.")}
    total = {}
    for name in each[0]:
        parts = [g[name] for g in each if g[name] is not None]
        total[name] = sum(parts) if parts else None
    require_gradients(_merged(ours), total, subset=True)


def rows(subject: Subject) -> None:
    """An expert on some rows gives those rows of the whole, which are the backbone's."""
    check_rows(subject, subject.inputs)


def check_rows(subject: Subject, inputs: Inputs) -> None:
    """The same on any inputs."""
    model = subject.two.eval()
    chosen = torch.tensor([2, 0])
    with torch.no_grad():
        state = model.run_trunk(*inputs[0], **inputs[1])
        whole = model.run_expert(1, state)[0]
        some = model.run_expert(1, state.select(chosen))[0]
        require_close(some, whole[chosen], "rows")
        expected = run(subject.expert_as_backbone(1), rows_of(inputs, chosen))
        require_close(some, expected, "rows against the backbone")


def deep_copy(subject: Subject) -> None:
    """A deep copy, also after a training step, computes the same and shares nothing."""
    model = copy.deepcopy(subject.two).train()
    try:
        run_wrapped(model, subject.inputs).sum().backward()
    except Exception as error:
        if not _trains(subject):
            raise NotApplicable("the backbone does not train on its input") from error
        raise
    model.eval()
    copied = copy.deepcopy(model)
    _same_outputs(copied, model, subject.inputs)
    addresses = {p.data_ptr() for p in model.parameters()}
    if any(p.data_ptr() in addresses for p in copied.parameters()):
        raise Failed("a parameter is shared with the copy")
    with torch.no_grad():
        before = run(model, subject.inputs)
        for parameter in copied.parameters():
            parameter.zero_()
        require_equal(run(model, subject.inputs), before, "after zeroing the copy")


def pickled(subject: Subject) -> None:
    """A pickled model computes the same."""
    try:
        pickle.dumps(clone_module(subject.backbone))
    except Exception as error:
        raise NotApplicable("the backbone itself cannot be pickled") from error
    model = subject.two.eval()
    _same_outputs(pickle.loads(pickle.dumps(model)), model, subject.inputs)


def state_dict(subject: Subject) -> None:
    """Names are the backbone's behind `trunk.` and `experts.k.`; saving and loading works."""
    model = subject.two.eval()
    saved = model.state_dict()
    theirs = set(subject.backbone.state_dict())
    for index in range(2):
        parts = ("trunk.", f"experts.{index}.")
        names = Counter(k.removeprefix(p) for k in saved for p in parts if k.startswith(p))
        if set(names) != theirs:
            raise Failed(f"names differ: {sorted(set(names) ^ theirs)[:3]}")
        tied = {k for k, n in names.items() if n > 1}
        if any(saved["trunk." + k].data_ptr() != saved[parts[1] + k].data_ptr() for k in tied):
            raise Failed(f"listed on both sides: {sorted(tied)[:3]}")
    if stray := [k for k in saved if not k.startswith(("trunk.", "experts."))]:
        raise Failed(f"other names: {stray[:3]}")
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    _same_outputs(other, model, subject.inputs)


def half(subject: Subject) -> None:
    """`.half()` of the model is `.half()` of the backbone."""
    _in_dtype(subject, torch.float16)


def bfloat16(subject: Subject) -> None:
    """`.bfloat16()` of the model is `.bfloat16()` of the backbone."""
    _in_dtype(subject, torch.bfloat16)


def sizes(subject: Subject) -> None:
    """Inputs of other sizes than the example's, where the backbone takes them; rows as well."""
    accepted = 0
    for inputs in other_sizes(subject.inputs):
        with torch.no_grad():
            plain = subject.plain()
            run(plain, subject.inputs)  # some backbones adapt themselves to the sizes they see
            try:
                expected = run(unfused(plain), inputs)
            except Exception:
                continue
            accepted += 1
            require_equal(run(subject.one.eval(), inputs), expected, "another size")
            check_rows(subject, inputs)
    if not accepted:
        raise NotApplicable("the backbone takes one size only")


def threads(subject: Subject) -> None:
    """Two threads that use one model at once get what each would get alone."""
    model = subject.two.eval()
    batches = [redrawn(subject.inputs, seed) for seed in (11, 12)]
    with torch.no_grad():
        expected = [run(model, batch) for batch in batches]
    wrong: list[str] = []

    def work(index: int) -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(2):
                with torch.no_grad():
                    got = logits_in(model(*batches[index][0], **batches[index][1]))
                require_equal(got, expected[index], f"thread {index}")
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if wrong:
        raise Failed(wrong[0])


def compiled(subject: Subject) -> None:
    """One graph without breaks, where the backbone compiles so."""
    if not subject.architecture.compile:
        raise NotApplicable("not tried")
    options: dict[str, Any] = {"fullgraph": True, "backend": "eager"}
    with torch.no_grad():
        try:
            expected = run(torch.compile(subject.plain(), **options), subject.inputs)
        except Exception as error:
            raise NotApplicable("the backbone does not compile without breaks") from error
        finally:
            torch.compiler.reset()
        model = torch.compile(subject.one.eval(), **options)
        require_close(run(model, subject.inputs), expected, "compiled")
        torch.compiler.reset()


def measure(subject: Subject) -> dict[str, Any]:
    """Fork point, and what share of parameters and multiply-adds lies in the trunk."""
    model = subject.one
    report = cost_report(model, example_input=model.example_input(1))
    return {
        "fork": model.fork_at,
        "parameters": report.trunk_parameters / max(1, report.parameters),
        "multiply_adds": report.trunk_flops / max(1, report.flops),
        "size": report.parameters,
    }


CHECKS: dict[str, Callable[[Subject], None]] = {
    "wraps": wraps,
    "eval": evaluation,
    "train": training,
    "once": trunk_once,
    "grad": gradients_one,
    "grad2": gradients_two,
    "rows": rows,
    "copy": deep_copy,
    "pickle": pickled,
    "names": state_dict,
    "half": half,
    "bf16": bfloat16,
    "sizes": sizes,
    "threads": threads,
    "compile": compiled,
}
"""Every check by its column in the table, in the order in which they run."""


def run_wrapped(model: RIDEWrapper, inputs: Inputs, seed: int = 0) -> Tensor:
    """The output of a wrapped model, which carries its expert logits."""
    torch.manual_seed(seed)
    return model(*inputs[0], **inputs[1])


def unfused(module: nn.Module) -> nn.Module:
    """Keep torch's transformer layers from their fused kernel, as any hook does."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.register_forward_hook(lambda *_: None)
    return module


def require_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """To the bit; NaNs are equal."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise Failed(f"{what}: {got.dtype} {list(got.shape)}")
    if not torch.equal(got, expected) and not torch.equal(
        torch.nan_to_num(got.double(), nan=1.5), torch.nan_to_num(expected.double(), nan=1.5)
    ):
        raise Failed(f"{what}: differs by {float((got.double() - expected.double()).abs().max())}")


def require_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Up to rounding: kernels differ with the number of rows."""
    scale = float(expected.abs().max()) + 1e-30
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=0, atol=1e-4 * scale):
        raise Failed(f"{what}: differs by {float((got - expected).abs().max()):.2g} of {scale:.2g}")


def require_gradients(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], subset: bool = False
) -> None:
    """Compare by name; rounding in sums over a batch is measured against the largest gradient."""
    if not subset and set(got) != set(expected):
        raise Failed(f"parameters: {sorted(set(got) ^ set(expected))[:3]}")
    largest = max((float(g.abs().max()) for g in expected.values() if g is not None), default=0.0)
    for name, ours in got.items():
        theirs = expected[name]
        if (ours is None or not ours.any()) and (theirs is None or not theirs.any()):
            continue
        if ours is None or theirs is None:
            raise Failed(f"{name}: {'no' if ours is None else 'a'} gradient")
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5 * largest, equal_nan=True):
            raise Failed(f"{name}: differs by {float((ours - theirs).abs().max()):.2g}")


def _gradients(module: nn.Module, compute: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    module.zero_grad(set_to_none=True)
    logits = compute()
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(logits.shape[0], logits.shape[-1], generator=generator)
    if logits.dim() == 3:  # the same direction for each expert
        direction = direction.unsqueeze(1)
    (logits * direction).sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def _merged(gradients: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """By the backbone's names."""
    return {
        name.removeprefix("trunk.")
        if name.startswith("trunk.")
        else ".".join(name.split(".")[2:]): gradient
        for name, gradient in gradients.items()
    }


def _calls(module: nn.Module, forward: Callable[[Any], Any]) -> Counter[str]:
    count: Counter[str] = Counter()
    handles = [
        part.register_forward_hook(lambda *_, name=name: count.update([name]))
        for name, part in module.named_modules()
        if not isinstance(part, torch.jit.ScriptModule)
    ]
    try:
        with torch.no_grad():
            forward(module)
    finally:
        for handle in handles:
            handle.remove()
    return count


def _same_outputs(a: RIDEWrapper, b: RIDEWrapper, inputs: Inputs) -> None:
    with torch.no_grad():
        ours, theirs = (expert_logits(run_wrapped(m, inputs)) for m in (a, b))
        require_equal(ours, theirs, "expert logits")


def _in_dtype(subject: Subject, dtype: torch.dtype) -> None:
    inputs = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, subject.inputs)
    with torch.no_grad():
        try:
            expected = run(unfused(subject.plain()).to(dtype), inputs)
        except Exception as error:
            raise NotApplicable(f"the backbone does not run in {dtype}") from error
        require_equal(run(copy.deepcopy(subject.one).eval().to(dtype), inputs), expected, "logits")


def _trains(subject: Subject) -> bool:
    try:
        run(subject.plain(training=True), subject.inputs).sum().backward()
    except Exception:
        return False
    return True
