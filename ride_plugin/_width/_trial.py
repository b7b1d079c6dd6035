"""A trial forward of a narrowed expert: layers are resized as the tensors reach them.

Output widths come from one map, input widths from the tensor that arrives. Where two widths have
to be equal and are not (in a residual sum with a tensor of the trunk, for example), the plan is
changed: the layer that made the narrower tensor gets a wider output, or a parameter that the
backbone's own code combines with the other tensor is resized. Then the next trial begins, until one
runs to its end.

Each operation is compared with the same operation of the full-width expert, so that a reshape with
a fixed number of channels cannot move positions into channels unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ride_plugin._split import operation_name
from ride_plugin._tree import map_tensors, tensors_in
from ride_plugin._width._amend import Amender
from ride_plugin._width._attention import Attention
from ride_plugin._width._choices import Choices
from ride_plugin._width._comparison import Comparison
from ride_plugin._width._kernels import fit_kernel, keeps_ratio
from ride_plugin._width._layers import ChannelPad, Kind, kind_of
from ride_plugin._width._ledger import CONVOLUTIONS, NORMS, RESHAPES, Ledger
from ride_plugin._width._map import WidthMap
from ride_plugin._width._norms import fit_norm
from ride_plugin._width._plan import Amended, NarrowingPlan, Step, Stuck
from ride_plugin._width._recurrent import Recurrent, recurrent_of
from ride_plugin._width._scales import Factors

_MISFITS = (RuntimeError, ValueError, IndexError, AssertionError)  # what torch raises for sizes


class Trial(TorchFunctionMode):
    """Runs an expert once and resizes its layers on the way.

    Args:
        expert: a throwaway copy of an expert.
        frozen: ids of tensors that the trunk owns.
        plan: amended when widths do not meet.
        widths: the map of widths.
        attentions: attention modules of the expert.
        tables: buffers that cannot be cut, and along which dimensions; see :func:`tables_of`.
    """

    def __init__(
        self,
        expert: nn.Module,
        frozen: set[int],
        plan: NarrowingPlan,
        widths: WidthMap,
        attentions: Sequence[Attention],
        tables: Mapping[str, Collection[int]],
    ) -> None:
        super().__init__()
        self.plan = plan
        self.widths = widths
        self.ledger = Ledger(expert, frozen)
        self.amender = Amender(self.ledger, plan, widths, attentions, tables)
        self._steps: Sequence[Step] = ()
        self._position = 0
        self._comparison, self._choices, self._factors = Comparison(), Choices(), Factors()
        self._set_attributes()
        for name, sizes in plan.raw.items():
            path, _, key = name.rpartition(".")
            self.ledger.resize(self.ledger.modules[path], key, sizes)
        for path, attribute, key in plan.shapes:
            module = self.ledger.modules[path]
            shape = self.ledger.resized_shape(module, attribute, key)
            if shape is not None:
                self.ledger.set_attribute(module, attribute, shape)

    def run(self, play: Callable[[], Any], steps: Sequence[Step], output: Sequence[Any]) -> None:
        """Run the expert once; ``steps`` and ``output`` are the full-width expert's.

        Raises:
            Amended: the plan was changed.
            Stuck: it does not run, and no change of the plan is left to try.
        """
        self._steps, self._position, self.amender.running = steps, 0, []
        handles = []
        for module in self.ledger.modules.values():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._exit))
        try:
            with self:
                result = play()
        except (Amended, Stuck):
            raise
        except Exception as error:
            self.amender.give_way((), f"{type(error).__name__}: {error}")
        finally:
            for handle in handles:
                handle.remove()
        for got, expected in zip(tensors_in(result), output, strict=True):
            if len(expected) == 2 and tuple(got.shape) != expected:  # logits keep their classes
                self.amender.pin(got, 1, expected[1], expected[1])
        self._refuse_choices("its caller", result)
        if self._position != len(self._steps):
            raise Stuck("the narrowed expert's forward takes another path than the original's")
        if self.amender.amended:
            raise Amended

    def follow_factors(self) -> list[str]:
        """After the runs, set factors that are roots of sizes; returns what to say of them."""
        return self._factors.follow(self.ledger, self.amender.attentions)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.ledger.names[id(module)]
        self.amender.running.append(name)
        with torch._C.DisableTorchFunction():
            kind = kind_of(module)
            x = next(tensors_in((args, kwargs)), None)
            self.amender.note_arrival(name, x)
            if kind is not None and x is not None:
                self._fix(module, kind, x)
            elif (recurrent := recurrent_of(module)) is not None and x is not None:
                self._fix_recurrent(module, recurrent, x)

    def _exit(self, module: nn.Module, args: Any, result: Any) -> None:
        self.amender.running.pop()
        with torch._C.DisableTorchFunction():
            kind = kind_of(module)
        if kind is not None and kind.in_dim is None and isinstance(result, Tensor):
            self.ledger.tag(result, frozenset({("layer", self.ledger.names[id(module)])}))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = operation_name(func)
        index, self._position = self._position, self._position + 1
        if index >= len(self._steps) or self._steps[index].name != name:
            self.amender.give_way(tensors_in((args, kwargs)), f"its path changes at `{name}`")
        step = self._steps[index]
        self._refuse_choices(f"`{name}`", (args, kwargs))
        if "weight" in name or name in ("linear", *CONVOLUTIONS):
            self._fix_functional(args, kwargs or {})
        if name in CONVOLUTIONS:
            fit_kernel(self.ledger, step, list(tensors_in((args, kwargs))))
        args, kwargs = map_tensors(self.ledger.current, (args, kwargs or {}))
        if name in NORMS:
            args, kwargs = fit_norm(self.amender, step, args, kwargs)
        try:
            if name == "__setitem__":
                _refuse_unfit(*args)
            result = func(*args, **kwargs)
        except _MISFITS as error:
            args, kwargs = self.amender.reconciled(name, step, args, kwargs, error)
            try:
                result = func(*args, **kwargs)
            except _MISFITS as again:
                reason = f"`{name}`: {str(again).splitlines()[0]}"
                self.amender.give_way(tensors_in((args, kwargs)), reason)
        self._factors.note(self.amender.where, step, args, kwargs)
        self._compare(name, step, list(tensors_in((args, kwargs))), result)
        self._choices.note(name, next(iter(step.inputs), None), args, kwargs, result)
        tags = self.ledger.tags_of_result(name, args, kwargs)
        for tensor in tensors_in(result):
            self.ledger.tag(tensor, tags)
        return result

    # --- resizing -------------------------------------------------------------------------------

    def _fix(self, module: nn.Module, kind: Kind, x: Tensor) -> None:
        """Give a layer the input width that arrives and the output width of the plan."""
        name = self.ledger.names[id(module)]
        weight: Any = module._parameters.get("weight")
        owned = weight is None or id(weight) in self.ledger.owners
        if (
            name in self.ledger.new_widths
            or not owned
            or (weight is None and hasattr(module, "weight"))
        ):
            if kind.in_dim is not None and x.dim() > 1:
                self.amender.pin(x, kind.axis, getattr(module, kind.in_name), x.shape[kind.axis])
            return
        arriving = x.shape[kind.axis] if kind.in_dim is not None else 0
        old_in = getattr(module, kind.in_name) if kind.in_dim is not None else 0
        old_out = getattr(module, kind.out_name)
        groups = getattr(module, "groups", 1)
        new_groups = groups
        out = self.plan.out.get(name, self._projections.get(name, self.widths(old_out)))
        if groups > 1 and groups == old_in:  # depthwise: as wide as its input
            new_groups, out = arriving, arriving * (old_out // old_in)
        elif groups > 1:
            if arriving % groups or out % groups:
                new_groups = arriving // (old_in // groups)
            if not new_groups or arriving % new_groups or out % new_groups:
                self.amender.give_way((x,), f"{arriving} and {out} channels in {groups} groups")
        elif isinstance(module, ChannelPad):
            out = max(out, x.shape[1])
        fan_ratio = 1.0
        if kind.in_dim is not None and arriving:
            fan_ratio = (old_in / groups) / (arriving / new_groups)
        if weight is not None:
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if key == "weight":
                    sizes = {kind.out_dim: out if kind.in_dim != 0 else out // new_groups}
                    if kind.in_dim is not None:
                        per_group = 1 if kind.in_dim == 0 else new_groups
                        sizes[kind.in_dim] = arriving // per_group
                    self.ledger.resize(module, key, sizes, fan_ratio)
                elif tensor.dim() and tensor.shape[0] == old_out:  # bias, gain
                    self.ledger.resize(module, key, {0: out}, fan_ratio)
        self.ledger.set_attribute(module, kind.out_name, out)
        if kind.in_dim is not None:
            self.ledger.set_attribute(module, kind.in_name, arriving)
        if groups != new_groups:
            self.ledger.set_attribute(module, "groups", new_groups)
        self.ledger.new_widths[name] = out
        self.ledger.layers[name] = (old_out, out)

    def _fix_recurrent(self, module: nn.Module, sizes: Recurrent, x: Tensor) -> None:
        """The same for a recurrent layer or cell, whose output is as wide as its state."""
        name, arriving = self.ledger.names[id(module)], x.shape[-1]
        weights = list(module.parameters())
        if name in self.ledger.new_widths or any(id(w) not in self.ledger.owners for w in weights):
            self.amender.pin(x, -1, sizes.inputs, arriving)
            return
        old_out = sizes.hidden * sizes.directions
        out = self.plan.out.get(name, self.widths(sizes.hidden) * sizes.directions)
        hidden = -(-out // sizes.directions)  # rounded up
        for key, shape, fan_ratio in sizes.resized(module, arriving, hidden):
            self.ledger.resize(module, key, shape, fan_ratio, parts=sizes.gates)
        self.ledger.set_attribute(module, "input_size", arriving)
        self.ledger.set_attribute(module, "hidden_size", hidden)
        self.ledger.new_widths[name] = hidden * sizes.directions
        self.ledger.layers[name] = (old_out, hidden * sizes.directions)

    def _fix_functional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layers whose weight is handed to a function by the code around them."""
        tensors = list(tensors_in((args, kwargs)))
        if len(tensors) < 2:
            return
        x, weight = tensors[:2]
        for module, key in self.ledger.owners.get(id(weight), ()):
            kind = kind_of(module)
            if (
                kind is not None
                and key == "weight"
                and self.ledger.names[id(module)] not in self.ledger.new_widths
            ):
                self._fix(module, kind, x)

    def _set_attributes(self) -> None:
        self._projections: dict[str, int] = {}
        for name, attention in self.amender.attentions.items():
            choices = attention.choices(self.widths.ratio)
            choice = choices[min(self.plan.choice.get(name, 0), len(choices) - 1)]
            widths, settings = attention.apply(choice, self.widths.ratio)
            prefix = name + "." if name else ""
            self._projections |= {prefix + key: width for key, width in widths.items()}
            for module, key, value in settings:
                self.ledger.set_attribute(module, key, value)

    def _compare(self, name: str, step: Step, given: Sequence[Tensor], result: Any) -> None:
        """Refuse what fits by luck: other groups, other pieces, and what came out empty."""
        outputs = list(tensors_in(result))
        reason = self._comparison.difference(name, step, next(iter(given), None), outputs)
        if reason is not None:
            self.amender.give_way(given[:1] if name in RESHAPES else given, reason)
        if name in CONVOLUTIONS and not keeps_ratio(self.ledger, step, given, outputs[0]):
            self.amender.give_way(given[:1], f"`{name}` with a fixed number of filters")

    def _refuse_choices(self, reader: str, value: Any) -> None:
        """Let what a gate chooses from keep its number, where the choice is read."""
        scores = self._choices.read_in(value)
        if scores is not None:
            self.amender.give_way((scores,), f"{reader} reads which output is chosen")


def _refuse_unfit(target: Any, index: Any, value: Any) -> None:
    """Raise where a value does not fit; without contents torch does not look."""
    if isinstance(target, Tensor) and isinstance(value, Tensor):
        with torch._C.DisableTorchFunction():
            value.expand_as(target[index])
