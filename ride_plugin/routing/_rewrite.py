"""The graph of an exported stage rewritten: fewer operations, and faster ones.

BatchNorm goes into the convolution before it, the addition of a residual and a ReLU into the
convolution whose result they take, and whatever depends on parameters alone is computed once.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ride_plugin._errors import ArgumentError
from ride_plugin.routing._fused_conv import AllFinite, FusedConv2d
from ride_plugin.routing._memory import Memory
from ride_plugin.routing._own import own_weights_of_module

_ATEN = torch.ops.aten
_RELU = (_ATEN.relu.default, _ATEN.relu_.default)
_TYPICAL_BATCH = 32  # weights are laid out for it; any batch runs


def rewritten(program: ExportedProgram) -> fx.GraphModule:
    """The program as a graph of fused operations."""
    exported = program.module()
    # A plain signature: what export's own calling convention does at each call is not needed.
    exported.graph.set_codegen(fx.graph.CodeGen())
    exported.graph._tracer_cls = None  # the one of export cannot be made again after pickling
    module = fx.GraphModule(exported, exported.graph).eval()
    own_weights_of_module(module)
    graph = module.graph
    _inline_autocast(module)
    _drop_checks(graph)
    memory = Memory(module)
    if not memory.depends_on_layout:  # else any other layout may change what is computed
        _drop_what_does_nothing(graph, memory)
        _compute_constants(module, memory)
        _choose_layouts(graph, memory)
        _fold_batch_norms(module, memory)
        _fuse_convolutions(module, memory)
        graph.eliminate_dead_code()
        _write_over_residuals(module)
        _look_at_what_enters(module)
    graph.lint()
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for name in set(module._buffers) - read:  # constants that later steps took over
        delattr(module, name)
    module.recompile()
    return module


def _inline_autocast(module: fx.GraphModule) -> None:
    """Regions that switch autocast off are put in place: a stage runs without autocast anyway."""
    graph = module.graph
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_autocast" or node.args[2]:
            continue
        inner = cast("fx.GraphModule", module.get_submodule(node.args[4].target))
        values = dict(zip(inner.graph.find_nodes(op="placeholder"), node.args[5:], strict=True))
        with graph.inserting_before(node):
            results = graph.graph_copy(inner.graph, values)
        results = results if isinstance(results, tuple | list) else (results,)
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def _drop_checks(graph: fx.Graph) -> None:
    """Drop export's checks of types and sizes."""
    for node in list(graph.nodes):
        if (
            node.target == "_guards_fn"
            or node.target is torch.ops.aten._assert_tensor_metadata.default
        ):
            graph.erase_node(node)


def _drop_what_does_nothing(graph: fx.Graph, memory: Memory) -> None:
    """Drop calls that return what they are given, or a copy of it that nobody needs."""
    node: Any
    for node in list(graph.nodes):
        value: Any = node.args[0] if node.args else None
        if node.target is _ATEN.cat.default:
            parts = list(value)
            if len({part.meta["val"].dtype for part in parts}) == 1:  # else they make a wider type
                parts = [part for part in parts if not _is_empty(part)] or parts[:1]
            node.args = (parts, *node.args[1:])
            value = parts[0]
        if not _does_nothing(node):
            continue
        if _copies(node) and (memory.written(value, after=node) or memory.written(node)):
            continue
        memory.join(value, node)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _does_nothing(node: Any) -> bool:
    if node.target is _ATEN.to.dtype:
        return bool(node.args[0].meta["val"].dtype == node.args[1])
    if node.target is _ATEN.slice.Tensor:
        given = list(node.args[2:])
        return given in ([], [0], [0, sys.maxsize], [0, sys.maxsize, 1])
    if node.target is _ATEN.movedim.int:
        return bool(node.args[1] == node.args[2])
    return bool(node.target is _ATEN.cat.default and len(node.args[0]) == 1)


def _copies(node: Any) -> bool:
    asked = node.args[3] if len(node.args) > 3 else node.kwargs.get("copy", False)
    return node.target is _ATEN.cat.default or (node.target is _ATEN.to.dtype and asked)


def _is_empty(node: Any) -> bool:
    return any(size == 0 for size in node.meta["val"].shape if isinstance(size, int))


def _choose_layouts(graph: fx.Graph, memory: Memory) -> None:
    """Images go through channels-last, in which convolutions are fastest."""
    for node in graph.find_nodes(op="placeholder"):
        users = [u for u in node.users if u.target is _ATEN.conv2d.default and u.args[0] is node]
        if users and not memory.written(node):
            with graph.inserting_after(node):
                laid_out = graph.call_method(
                    "contiguous", (node,), {"memory_format": torch.channels_last}
                )
            laid_out.meta = dict(node.meta)
            memory.join(laid_out, node)
            for user in users:
                user.replace_input_with(node, laid_out)
    for node in graph.find_nodes(op="call_function", target=_ATEN.view.default):
        node.target = _ATEN.reshape.default  # of channels-last there is not always a view


def _constant(module: fx.GraphModule, memory: Memory, node: Any) -> Tensor | None:
    """The tensor that an argument reads from the module, where nobody writes it; or None."""
    if isinstance(node, fx.Node) and node.op == "get_attr" and not memory.written(node):
        value = operator.attrgetter(str(node.target))(module)
        return value if isinstance(value, Tensor) else None
    return None


def _constants(
    module: fx.GraphModule, memory: Memory, arguments: Sequence[Any]
) -> list[Tensor | None] | None:
    """The constants of all arguments, None for one that is absent; or None if one is computed."""
    values = [_constant(module, memory, argument) for argument in arguments]
    pairs = zip(values, arguments, strict=True)
    known = all(value is not None or argument is None for value, argument in pairs)
    return values if known else None


def _weight_and_bias(conv: fx.Node) -> tuple[Any, Any]:
    return conv.args[1], conv.args[2] if len(conv.args) > 2 else None


def _fold_batch_norms(module: fx.GraphModule, memory: Memory) -> None:
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_ATEN.batch_norm.default):
        before, *statistics = node.args[:5]
        training, _, eps = node.args[5:8]
        if before.target is not _ATEN.conv2d.default or len(before.users) > 1 or training:
            continue
        values = _constants(module, memory, [*_weight_and_bias(before), *statistics])
        if values is None:
            continue
        weight, bias, gamma, beta, mean, var = values
        given: Any = (weight, bias, mean, var, eps, gamma, beta)
        new_weight, new_bias = fuse_conv_bn_weights(*given)
        with graph.inserting_before(before):
            arguments = [
                _new_constant(module, f"{before.name}_{what}", value)
                for what, value in (("weight", new_weight), ("bias", new_bias))
            ]
        before.args = (before.args[0], *arguments, *before.args[3:])
        memory.join(before, node)
        node.replace_all_uses_with(before)
        graph.erase_node(node)


def _new_constant(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, value)
    return module.graph.get_attr(name)


def _fuse_convolutions(module: fx.GraphModule, memory: Memory) -> None:
    graph = module.graph
    for index, node in enumerate(graph.find_nodes(op="call_function", target=_ATEN.conv2d.default)):
        values = _constants(module, memory, _weight_and_bias(node))
        if values is None:
            continue
        weight, bias = values
        assert weight is not None
        _check_weights(node, weight, bias)
        chain, other = _chain(node, memory)
        options = (
            list(node.args[3]) if len(node.args) > 3 else [1, 1],
            list(node.args[4]) if len(node.args) > 4 else [0, 0],
            list(node.args[5]) if len(node.args) > 5 else [1, 1],
            node.args[6] if len(node.args) > 6 else 1,
        )
        relu = chain[-1].target in _RELU
        fused = FusedConv2d(weight, bias, options, relu, _sizes(node.args[0]))
        module.add_submodule(f"fused_{index}", fused)
        with graph.inserting_before(chain[-1]):
            inputs = (node.args[0],) if other is None else (node.args[0], other)
            call = graph.call_module(f"fused_{index}", inputs)
        call.meta = dict(chain[-1].meta)
        memory.join(call, chain[-1])
        chain[-1].replace_all_uses_with(call)
        for replaced in reversed(chain):  # what works in place outlives a search for dead code
            graph.erase_node(replaced)


def _chain(node: fx.Node, memory: Memory) -> tuple[list[fx.Node], fx.Node | None]:
    """A convolution with the addition and the ReLU that can be one call with it; the addend.

    The fused call stands where the last of them stood, so nobody may write what the others read in
    between.
    """
    x, chain, other = node.args[0], [node], None
    added = _only_user(node, _ATEN.add.Tensor, _ATEN.add_.Tensor)
    if added is not None and not added.kwargs and not memory.written(x, node, added):
        left, right = added.args
        value = right if left is node else left
        overwritten = node if added.target is _ATEN.add.Tensor else left
        if overwritten is node and value is not node and _alike(node, value):
            chain, other = [node, added], cast("fx.Node", value)
    relu = _only_user(chain[-1], *_RELU)
    if relu is not None and not (
        memory.written(x, node, relu) or memory.written(other, chain[-1], relu)
    ):
        chain.append(relu)
    return chain, other


def _write_over_residuals(module: fx.GraphModule) -> None:
    """Let a sum take the place of its residual, which saves fresh memory in every block.

    The residual must be what another convolution returned, so that it is no input of the stage, and
    only convolutions may read it, all of them before, so that no view of it is read later.
    """
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    submodules = dict(module.named_modules())

    def convolution(node: Any) -> bool:
        return node.op == "call_module" and isinstance(submodules[node.target], FusedConv2d)

    for node in filter(convolution, module.graph.nodes):
        x, *rest = node.args
        if not rest or rest[0] is x or not convolution(rest[0]):
            continue
        readers = [user for user in rest[0].users if user is not node]
        if all(convolution(user) and order[user] < order[node] for user in readers):
            submodules[node.target].onto = True


def _look_at_what_enters(module: fx.GraphModule) -> None:
    """Check what comes to a fused convolution from outside, past no other, for NaN and infinity.

    What follows from finite values is taken to be finite, so that each input is looked at once.
    """
    graph, submodules = module.graph, dict(module.named_modules())
    outside: set[fx.Node] = set()
    node: Any
    for node in list(graph.nodes):
        if not isinstance(submodules.get(str(node.target)), FusedConv2d):
            inner = [i for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor)]
            if node.op == "placeholder" or not outside.isdisjoint(inner):
                outside.add(node)
            continue
        for value in outside.intersection(node.all_input_nodes):
            readers = [user for user in value.users if user.op == "call_module"]
            name = f"{value.name}_finite"
            module.add_submodule(name, AllFinite())
            with graph.inserting_before(node):
                checked = graph.call_module(name, (value,))
            checked.meta = dict(value.meta)
            for reader in readers:
                reader.replace_input_with(value, checked)
            outside.remove(value)


def _check_weights(conv: fx.Node, *constants: Tensor | None) -> None:
    for constant in constants:
        if constant is not None and not bool(constant.isfinite().all()):
            raise ArgumentError(
                f"Expected the weights of every stage to be finite, but those of `{conv.args[1]}` "
                "(with a BatchNorm after it, if there is one) hold NaN or infinity. The training "
                "has probably diverged."
            )


def _only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in targets else None


def _alike(a: Any, b: Any) -> bool:
    """Whether two values have one shape and one dtype."""
    if not isinstance(b, fx.Node):
        return False
    first, second = (node.meta.get("val") for node in (a, b))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return first.dtype == second.dtype and str(first.shape) == str(second.shape)


def _sizes(node: fx.Node) -> list[int]:
    return [s if isinstance(s, int) else _TYPICAL_BATCH for s in node.meta["val"].shape]


def _compute_constants(module: fx.GraphModule, memory: Memory) -> None:
    """Compute once what depends on parameters alone, such as a cosine classifier's directions."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        inputs = node.all_input_nodes
        values = {source: _constant(module, memory, source) for source in inputs}
        if not inputs or None in values.values() or memory.written(node):
            continue
        if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        result = node.target(
            *fx.map_arg(node.args, values.__getitem__),
            **fx.map_arg(node.kwargs, values.__getitem__),
        )
        if isinstance(result, Tensor):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_new_constant(module, f"{node.name}_value", result))
            graph.erase_node(node)
