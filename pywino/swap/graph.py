# SPDX-License-Identifier: BSD-3-Clause
"""fuse_ and convert_ change what stands around a convolution: they must know what calls what.

Every module's own forward is traced by torch.fx with its children as leaves. A module whose caller
was traced is known to be called whole, and how often; under a caller that cannot be traced nothing
is known, and nothing is fused.

Where the forward of a block need not change, a module is put in place of a ReLU or BatchNorm (VGG's
`nn.Sequential`). Where it must (functional ReLUs, one ReLU module called several times, residual
adds), that block alone becomes a `torch.fx.GraphModule` of the same children and parameters, under
the same names.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pywino.nn._instance_norm import InstanceNorm2d
from pywino.nn.dilated_conv import DilatedConv2d
from pywino.nn.winograd import WinogradConv2d, WinogradReLUConv2d
from pywino.swap.configs import HANDLERS, WinogradReLU, warn
from pywino.swap.layers import (
    Attributes,
    FilterFn,
    call,
    check_runnable,
    named_layers,
    remember,
    replace_modules,
    select,
    untouched,
)
from pywino.swap.report import Layer, Report, reasons

_RELU_CALLS = {torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"}
_ADD_CALLS = {operator.add, torch.add, "add"}
_ADD_INTO_CALLS = {operator.iadd, "add_"}  # these write into their first argument
# With running statistics all are the same affine map in eval mode.
_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, InstanceNorm2d)
_FUSIBLE = (WinogradConv2d, DilatedConv2d)  # they take a residual and a ReLU
_FRESH = {nn.Conv2d, *_NORMS, *_FUSIBLE, WinogradReLUConv2d}  # output is new memory
_MAX_OPTIONAL = 4  # every combination of a forward's optional arguments is traced


class FusedReLU(nn.Identity):
    """Stands for a ReLU that is in the epilogue of a convolution now; `restore_` puts it back."""

    def __init__(self, relu: nn.ReLU, conv: nn.Module):
        super().__init__()
        self.training = relu.training
        self.inplace = relu.inplace
        self._conv = [conv]  # in a list, so that it is no child of this module


def fuse_(model: nn.Module) -> nn.Module:
    """Moves BatchNorm, ReLU and residual add into the convolution before them. Eval mode only.

    Fused are, where nothing else uses what lies between:
        convolution (any `nn.Conv2d` or `WinogradConv2d`) -> BatchNorm2d with running statistics,
            and InstanceNorm2d that keeps them, likewise
        WinogradConv2d [-> BatchNorm2d] [-> + residual] -> ReLU (module or function)
        WinogradConv2d [-> BatchNorm2d] -> + residual (new, or into the convolution's output)
    A DilatedConv2d counts as a WinogradConv2d.

    Not fused: other activations, functional or frozen BatchNorm, `alpha * residual`, modules with
    hooks, convolutions that are called more than once or whose weights are read elsewhere, and
    everything under a forward that torch.fx cannot trace (it is named, with fx's words; fuse_ a
    part of the model that can be traced). Call `swap_` first: a ReLU behind an `nn.Conv2d` stays.

    A ReLU or BatchNorm module that is called once becomes an `nn.Identity`. Anything else changes
    the forward of the module that holds it; that module becomes a `torch.fx.GraphModule` of the
    same children (in ResNet-50: the bottlenecks with stride 1), no longer an instance of its class.
    Its arguments, names and weights stay. In VGG-16 and ResNet-50 the model itself stays the object
    that it was; use the return value where the model itself is such a block.

    BatchNorm goes into the weights: they become new Parameters, a bias appears, and the checkpoint
    is no longer one of the unfused model. Results differ by rounding. `restore_` gives back ReLU
    and add, not BatchNorm. `last_report(model)` lists what was fused and what was not.

    Raises RuntimeError in train mode. Warns when nothing was fused, and about forwards that cannot
    be traced.
    """
    if any(module.training for module in model.modules()):
        raise RuntimeError(
            "pywino.fuse_: the model must be in eval mode (BatchNorm is folded with its running "
            "statistics), got train mode; call model.eval() first"
        )
    survey = _Survey(model)
    edits = _Edits(model, survey)
    rows = []
    for block in survey.blocks:
        for node, conv in list(block.convolutions()):
            fused, reason = _fuse_one(edits, block, node, conv)
            if fused or type(conv) in _FUSIBLE:
                action = "fuse" if fused else "leave"
                reason = "; ".join(filter(None, [" + ".join(fused), reason]))
                rows.append(Layer(block.name_of(node.target), type(conv).__name__, action, reason))
    seen = {row.fqn for row in rows}
    for module, names in named_layers(model):
        if type(module) in _FUSIBLE and not seen.intersection(names):
            kind = type(module).__name__
            rows.append(Layer(names[0], kind, "leave", "its caller was not traced"))
    model = edits.apply()
    notes = [f"{fqn or 'the model'} cannot be traced: {reason}" for fqn, reason in survey.untraced]
    report = Report(rows, "fuse_", notes)
    remember(model, report)
    if notes:
        warn(
            "pywino.fuse_ left what is called by forwards that torch.fx cannot trace: "
            + "; ".join(notes)
        )
    if not report.changed():
        warn(
            "pywino.fuse_ changed nothing: "
            + (reasons(rows) or "no convolution is followed by something to fuse")
        )
    return model


def convert_(
    model: nn.Module,
    config: WinogradReLU | dict[str, WinogradReLU | None] | None = None,
    *,
    example: Any = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
) -> nn.Module:
    """Replaces ReLU -> 3x3 convolution by `WinogradReLUConv2d`, in place, and returns the model.

    The function changes: ReLU is taken of the Winograd-domain values, and the filters have (tile +
    2)^2 free weights instead of 9. The model must be trained afterwards, which a warning says.
    Weights are new Parameters, starting from G w G^T or fresh by `WinogradReLU(init=...)`; make the
    optimizer after this call.

    A pair is taken where torch.fx shows that the ReLU's output feeds that convolution alone:
    neighbours in an `nn.Sequential`, modules or functional ReLUs in a forward. The ReLU module
    becomes an `nn.Identity`; where it is called elsewhere too, or is functional, the module that
    holds it becomes a `torch.fx.GraphModule` of the same children. Under a forward that cannot be
    traced only neighbours in an `nn.Sequential` are taken, as if it were called whole.

    config, filter_fn: as in `swap_`, over the convolutions. strict: a selected convolution that
    cannot be converted raises, and nothing is changed. example: an input; the converted model is
    run on it once, in eval mode, so that a mistake shows here. `last_report(model)` lists what was
    converted and what was left, `plan` with the same config beforehand.

    Raises RuntimeError (strict) and TypeError (no such config).
    """
    if example is not None:
        check_runnable(model, "convert_")
    edits, rows, notes = _find_pairs(model, config, filter_fn, "convert_")
    report = Report(rows, "convert_", notes)
    left = reasons(report.left())
    if strict and left:
        raise RuntimeError(
            "pywino.convert_(strict=True): these selected layers stay as they are, and nothing was "
            f"changed: {left}. Leave them out by filter_fn or a glob with None, or drop strict."
        )
    model = edits.apply()
    remember(model, report)
    if not report.changed():
        warn("pywino.convert_ changed nothing: " + (left or "the model has no torch.nn.Conv2d"))
        return model
    names = [row.fqn or "(root)" for row in report.changed()]
    warn(
        f"pywino.convert_ changed the function of {len(names)} layers ({', '.join(names)}): "
        "train the model before you use it." + (f" Left: {left}" if left else "")
    )
    if example is not None:
        with untouched(model):
            call(model, example)
    return model


def plan_conversion(model: nn.Module, config: object, filter_fn: FilterFn | None) -> Report:
    """The report of `convert_` without converting."""
    _, rows, notes = _find_pairs(model, config, filter_fn, "plan")
    return Report(rows, "plan", notes)


# --- what calls what ---


class _Proxy(fx.Proxy):
    """fx records `x += y` as `x = x + y`: who else holds x would not see the sum any more."""


def _in_place(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _OneLevel(fx.Tracer):
    """Traces one forward; every child is a leaf."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


@dataclass
class _Block:
    """A module that is called whole, and its forward.

    graphs: one for each way that optional arguments open. rigid: why the forward cannot be
    rewritten. One with optional arguments never is: where it can be, `graph` is all there is.
    """

    fqn: str
    module: nn.Module
    graphs: list[fx.Graph]
    rigid: str | None
    assumed: bool  # nobody knows that it is called whole
    edited: bool = False

    @property
    def graph(self) -> fx.Graph:
        return self.graphs[0]

    def name_of(self, target: str) -> str:
        return f"{self.fqn}.{target}" if self.fqn else target

    def child(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(node.target)
        return None

    def convolutions(self) -> Iterator[tuple[fx.Node, nn.Conv2d]]:
        """Every convolution that is called, once, with a call of it."""
        found = set()
        for graph in self.graphs:
            for node in list(graph.nodes):
                child = self.child(node)
                if type(child) in (nn.Conv2d, *_FUSIBLE) and child not in found:
                    found.add(child)
                    yield node, child

    def surroundings(self, conv: nn.Module) -> set[tuple]:
        """What stands around the calls of a convolution: one element if it is the same in all."""
        found = set()
        for graph in self.graphs:
            for node in graph.nodes:
                if self.child(node) is conv:
                    around = [node]
                    for _ in range(2):
                        inputs = around[0].all_input_nodes
                        around = [inputs[0], *around] if inputs else around
                    while (after := _sole_user(around[-1])) is not None:
                        around.append(after)
                        kept_in = type(self.child(after)) in (*_NORMS, nn.Identity)
                        if not kept_in and not _adds(after):
                            break
                    found.add(tuple((n.op, n.target, len(n.users)) for n in around))
        return found


class _Survey:
    """Traces a model from the root down, and counts who is called how often."""

    def __init__(self, model: nn.Module, assume_sequential: bool = False):
        self.blocks: list[_Block] = []
        self.untraced: list[tuple[str, str]] = []
        self.calls: Counter[int] = Counter()  # call sites, by id of the module
        self.read: set[int] = set()  # modules of which somebody else reads a parameter
        self.untraceable: set[int] = set()  # modules below a forward that cannot be traced
        self.positions = {id(module): len(names) for module, names in named_layers(model)}
        self._assume_sequential = assume_sequential
        self._seen: set[int] = set()
        if isinstance(model, (nn.Conv2d, WinogradConv2d)):
            return
        self._visit(model, "", assumed=False)

    def _visit(self, module: nn.Module, fqn: str, assumed: bool) -> None:
        if id(module) in self._seen or not any(isinstance(m, nn.Conv2d) for m in module.modules()):
            return
        self._seen.add(id(module))
        try:
            graphs, rigid = _trace(module)
        except Exception as error:  # whatever a forward does when it is given proxies
            words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self.untraced.append((fqn, words))
            self.untraceable |= {id(m) for m in module.modules()}
            if self._assume_sequential:
                for name, child in module.named_modules():
                    if type(child) is nn.Sequential:
                        self._visit(child, f"{fqn}.{name}" if fqn else name, assumed=True)
            return

        called, sites = {}, Counter()
        for graph in graphs:
            here: Counter[tuple] = Counter()
            for node in graph.nodes:
                if node.op == "call_module":
                    child = module.get_submodule(node.target)
                    called[id(child)] = (child, node.target)
                    inputs = tuple(argument.target for argument in node.all_input_nodes)
                    here[id(child), inputs] += 1
                elif node.op == "get_attr" and "." in node.target:
                    self.read.add(id(module.get_submodule(node.target.rpartition(".")[0])))
            sites |= here  # the most that one way through this forward calls it
        for (child_id, _), count in sites.items():
            self.calls[child_id] += count
        self.blocks.append(_Block(fqn, module, graphs, rigid, assumed))
        for child, target in called.values():
            if child._modules:
                self._visit(child, f"{fqn}.{target}" if fqn else target, assumed)

    def why_not(self, block: _Block, conv: nn.Module) -> str | None:
        """Why a convolution cannot be changed for what stands around its call in this block."""
        if self.calls[id(conv)] > 1:
            return "it is called more than once"
        if id(conv) in self.read:
            return "its parameters are read elsewhere"
        if id(conv) in self.untraceable and not block.assumed:
            return "a forward that cannot be traced may call it too"
        if _has_hooks(conv):
            return "it has hooks"
        if len(block.surroundings(conv)) > 1:
            return "an optional argument of the forward changes what stands around it"
        return None

    def called_once(self, module: nn.Module) -> bool:
        """Is this module called in one place and known by one name, so that it can be replaced?"""
        return self.calls[id(module)] == 1 and self.positions[id(module)] == 1


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _trace(module: nn.Module) -> tuple[list[fx.Graph], str | None]:
    """The graphs of a forward, one for each way that optional arguments open; why it is rigid."""
    if "forward" in vars(module):
        raise RuntimeError("another forward is bound to it")
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise RuntimeError("its forward takes *args or **kwargs")
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    if len(optional) > _MAX_OPTIONAL:
        raise RuntimeError(f"its forward has more than {_MAX_OPTIONAL} optional arguments")

    # For each optional argument: its default, and any other value (of a bool, the other one).
    ways = []
    for name, default in optional.items():
        ways.append([{name: default}, {name: not default} if isinstance(default, bool) else {}])
    graphs, wrote = [], False
    for way in itertools.product(*ways):
        graph, sets_attributes = _trace_once(
            module, {k: v for choice in way for k, v in choice.items()}
        )
        graphs.append(graph)
        wrote |= sets_attributes
    if optional:
        return graphs, "its forward has optional arguments"
    if wrote:
        return graphs, "its forward sets attributes"
    if _has_hooks(module):
        return graphs, "the module that calls it has hooks"
    return graphs, None


def _trace_once(module: nn.Module, fixed: dict[str, Any] | None = None) -> tuple[fx.Graph, bool]:
    """The graph of a forward with some arguments fixed, and whether it sets attributes."""
    attributes = Attributes([module])
    try:
        graph = _OneLevel().trace(module, fixed or None)
    finally:
        wrote = attributes.restore()  # what it set are proxies
    return graph, wrote


# --- changing it ---


@dataclass
class _Edits:
    """Collected changes; `apply` makes them."""

    model: nn.Module
    survey: _Survey
    modules: dict[int, nn.Module] = field(default_factory=dict)
    kept: list[nn.Module] = field(default_factory=list)  # so that no id is used again
    actions: list[Any] = field(default_factory=list)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        self.modules[id(old)] = new
        self.kept.append(old)

    def apply(self) -> nn.Module:
        for action in self.actions:
            action()
        model = replace_modules(self.model, self.modules)
        rewritten = {}
        for block in self.survey.blocks:
            if block.edited:
                rewritten[id(block.module)] = _graph_module(block)
        return replace_modules(model, rewritten)


def _graph_module(block: _Block) -> fx.GraphModule:
    block.graph.lint()
    new = fx.GraphModule(block.module, block.graph, class_name=type(block.module).__name__)
    # fx copies what the graph uses; the rest belongs to the checkpoint too, in the module's order.
    for slot in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(new)[slot] = vars(block.module)[slot]
    for name, value in vars(block.module).items():
        vars(new).setdefault(name, value)
    new.training = block.module.training
    return new


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_relu(block: _Block, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(block.child(node)) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELU_CALLS


def _adds(node: fx.Node) -> bool:
    targets = _ADD_CALLS | _ADD_INTO_CALLS
    return node.op in ("call_function", "call_method") and node.target in targets


def _relu_is_inplace(block: _Block, node: fx.Node) -> bool:
    if node.op == "call_module":
        return block.child(node).inplace
    return str(getattr(node.target, "__name__", node.target)).endswith("_") or bool(
        node.kwargs.get("inplace", len(node.args) > 1 and node.args[1])
    )


def _fuse_one(
    edits: _Edits, block: _Block, node: fx.Node, conv: nn.Conv2d
) -> tuple[list[str], str]:
    """(what was fused into this convolution, why no more)."""
    survey = edits.survey
    if reason := survey.why_not(block, conv) or _not_plain(conv):
        return [], reason
    fused: list[str] = []
    chain = [node]  # the convolution, and what is already part of it
    after = _skip_identities(block, chain)

    bn = block.child(after)
    if type(bn) in _NORMS and getattr(conv, "activation", None) is None:
        norm = type(bn).__name__.removesuffix("2d")
        if bn.running_mean is None:
            return fused, f"the {norm} after it has no running statistics"
        if _has_hooks(bn):
            return fused, f"the {norm} after it has hooks"
        if id(bn) in survey.read:
            return fused, f"the parameters of the {norm} after it are read elsewhere"
        if survey.called_once(bn):
            edits.replace(bn, nn.Identity().train(bn.training))
            chain.append(after)
        elif block.rigid:
            return fused, f"its {norm} is called more than once, and {block.rigid}"
        else:
            _erase(after, chain[-1])
            block.edited = True
        edits.actions.append(lambda: _fold(conv, bn))
        fused.append(f"{norm} {block.name_of(after.target)}")
        after = _skip_identities(block, chain)

    if (
        type(conv) not in _FUSIBLE
        or conv.activation is not None
        or len(node.args) + len(node.kwargs) != 1
    ):
        return fused, ""
    if after is None:
        return fused, "" if fused else "its output is used more than once"

    residual, reason = _residual(block, chain, after)
    if residual is not None:
        add = after
        relu = _sole_user(add)
        has_relu = relu is not None and _is_relu(block, relu) and not _relu_hooked(block, relu)
        if block.rigid:
            return fused, f"{block.rigid}, so that the add after it stays"
        add.prepend(node)  # by then the residual is there
        node.args = (*node.args, *node.kwargs.values(), residual)
        node.kwargs = {}
        for old in [*chain[1:], add, *([relu] if has_relu else [])]:
            _erase(old, node)
        block.edited = True
        fused.append("add")
        if has_relu:
            edits.actions.append(lambda: setattr(conv, "activation", "relu"))
            fused.append("ReLU")
        return fused, ""

    if not _is_relu(block, after):
        return fused, reason or f"{_spoken(block, after)} follows it"
    if _relu_hooked(block, after):
        return fused, "the ReLU after it has hooks"
    relu = block.child(after)
    if relu is not None and survey.called_once(relu):
        edits.replace(relu, FusedReLU(relu, conv))
    elif block.rigid:
        return fused, f"{block.rigid}, and its ReLU is functional or called more than once"
    else:
        _erase(after, chain[-1])
        block.edited = True
    edits.actions.append(lambda: setattr(conv, "activation", "relu"))
    fused.append("ReLU")
    return fused, ""


def _spoken(block: _Block, node: fx.Node) -> str:
    """What a node is, for a reader of the model's code."""
    if node.op == "output":
        return "the end of its forward"
    if (child := block.child(node)) is not None:
        return f"{type(child).__name__} {block.name_of(node.target)}"
    return str(getattr(node.target, "__name__", node.target))


def _relu_hooked(block: _Block, node: fx.Node) -> bool:
    relu = block.child(node)
    return relu is not None and _has_hooks(relu)


def _weight_name(conv: nn.Conv2d) -> str:
    return "winograd_weight" if "winograd_weight" in conv._parameters else "weight"


def _not_plain(conv: nn.Conv2d) -> str | None:
    for name in (_weight_name(conv), "bias"):
        if name not in conv._parameters:
            return f"its {name} is computed from something else"
    return None


def _skip_identities(block: _Block, chain: list[fx.Node]) -> fx.Node | None:
    """The one user of the chain's output that is no Identity; those in between join the chain."""
    while (after := _sole_user(chain[-1])) is not None:
        child = block.child(after)
        if type(child) is not nn.Identity or _has_hooks(child):
            break
        chain.append(after)
    return after


def _erase(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
    name = _weight_name(conv)
    statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    weight, conv.bias = fuse_conv_bn_weights(getattr(conv, name), conv.bias, *statistics)
    setattr(conv, name, weight)


def _residual(block: _Block, chain: list[fx.Node], add: fx.Node) -> tuple[fx.Node | None, str]:
    """(what the node `add` adds to the chain's output, or None; why that cannot be fused)."""
    if not _adds(add):
        return None, ""
    if len(add.args) != 2 or add.kwargs:
        return None, "the add after it has a factor or an output"
    ours, residual = add.args
    if ours is not chain[-1]:
        if add.target in _ADD_INTO_CALLS:
            return None, "the add after it writes into the residual"
        ours, residual = residual, ours
    if not isinstance(residual, fx.Node) or residual is ours:
        return None, "what is added to it is no other tensor"
    order = list(block.graph.nodes)
    between = order[order.index(chain[0]) : order.index(add)]
    if len(between) > len(chain) and not _is_private(block, chain[0].all_input_nodes[0]):
        # The convolution is called later then: something might have written into its input.
        return None, "something is computed between it and the add, and its input has other users"
    return residual, ""


def _is_private(block: _Block, node: fx.Node) -> bool:
    """Is this tensor, and all that it may be a view of, used by one node alone?"""
    while len(node.users) == 1:
        child = block.child(node)
        if type(child) in _FRESH:
            return True
        # A module that is not known may return its input.
        if (child is None and not _is_relu(block, node)) or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return False


# --- undoing it ---


def _graph_calls(model: nn.Module) -> Iterator[tuple[fx.GraphModule, fx.Node, WinogradConv2d]]:
    """Calls of WinogradConv2d layers with something fused, in the graphs of the model."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            for node in list(module.graph.nodes):
                if node.op == "call_module":
                    conv = module.get_submodule(node.target)
                    if type(conv) in _FUSIBLE and (conv.activation or len(node.args) > 1):
                        yield module, node, conv


def _fused_modules(model: nn.Module) -> Iterator[FusedReLU]:
    yield from (module for module in model.modules() if isinstance(module, FusedReLU))


def fused_elsewhere(model: nn.Module) -> set[int]:
    """Ids of layers with a ReLU that `unfuse` could not give back."""
    given_back = {id(relu._conv[0]) for relu in _fused_modules(model)}
    given_back |= {id(conv) for _, _, conv in _graph_calls(model)}
    layers = {id(m) for m in model.modules() if type(m) in _FUSIBLE and m.activation is not None}
    return layers - given_back


def unfuse(model: nn.Module) -> None:
    """Gives ReLUs and adds that `fuse_` took back to the modules and graphs that they came from."""
    restored = {}
    for fused in list(_fused_modules(model)):
        restored[id(fused)] = nn.ReLU(fused.inplace).train(fused.training)
        fused._conv[0].activation = None
    changed, given_back = {}, []
    for module, node, conv in list(_graph_calls(model)):
        graph, last = module.graph, node
        users = list(node.users)
        if len(node.args) > 1:
            input, residual = node.args
            node.args = (input,)
            with graph.inserting_after(last):
                last = graph.call_function(torch.add, (node, residual))
        if conv.activation == "relu":
            with graph.inserting_after(last):
                last = graph.call_function(F.relu, (last,))
        for user in users:
            user.replace_input_with(node, last)
        changed[module] = None
        given_back.append(conv)
    for conv in given_back:
        conv.activation = None
    for module in changed:
        module.recompile()
    replace_modules(model, restored)


# --- pairs of ReLU and convolution ---


def _find_pairs(
    model: nn.Module, config: object, filter_fn: FilterFn | None, op: str
) -> tuple[_Edits, list[Layer], list[str]]:
    survey = _Survey(model, assume_sequential=True)
    edits = _Edits(model, survey)
    sites = {}
    for block in survey.blocks:
        for node, conv in block.convolutions():
            sites.setdefault(id(conv), (block, node))
    rows = []
    for conv, names, configs, why_none in select(
        model, config, filter_fn, op, keeps_function=False
    ):
        row = Layer(names[0], type(conv).__name__, "leave", why_none)
        for choice in configs[:1]:
            handler = HANDLERS[type(choice)]
            if type(conv) is handler.layer:
                row.action, row.reason = "already", ""
                continue
            row.reason = handler.refuse(conv, choice) or ""
            if not row.reason and id(conv) not in sites:
                row.reason = "its caller was not traced"
            if not row.reason:
                block, node = sites[id(conv)]
                row.action, row.reason = _take_pair(edits, block, node, conv, handler, choice)
        rows.append(row)
    notes = [f"{fqn or 'the model'} cannot be traced: {reason}" for fqn, reason in survey.untraced]
    return edits, rows, notes


def _take_pair(
    edits: _Edits, block: _Block, node: fx.Node, conv: nn.Conv2d, handler: Any, config: Any
) -> tuple[str, str]:
    """("convert", with which ReLU) and the edits for it, or ("leave", why)."""
    survey = edits.survey
    if reason := survey.why_not(block, conv):
        return "leave", reason
    relu = node.all_input_nodes[0]
    if len(node.all_input_nodes) != 1 or not _is_relu(block, relu):
        return "leave", "its input does not come from a ReLU"
    if _sole_user(relu) is None:
        return "leave", "the ReLU before it feeds something else too"
    if _relu_hooked(block, relu):
        return "leave", "the ReLU before it has hooks"
    source = relu.all_input_nodes[0]
    if _relu_is_inplace(block, relu) and not _is_private(block, source):
        return "leave", "the ReLU before it is in place, and others may use what it writes into"
    module = block.child(relu)
    if block.assumed and max(survey.positions[id(conv)], survey.positions[id(module)]) > 1:
        return "leave", "it or its ReLU is in several places of a model that cannot be traced"

    if module is not None and survey.called_once(module):
        edits.replace(module, nn.Identity().train(module.training))
    elif reason := block.rigid or _depends_on_training(block.module):
        return "leave", f"{reason}, and its ReLU is functional or called more than once"
    else:
        _erase(relu, source)
        block.edited = True

    def make() -> None:
        edits.replace(conv, handler.make(conv, config))

    edits.actions.append(make)
    how = f"with the ReLU {relu.target if module is not None else relu.name}"
    return "convert", how + (", as neighbours in a Sequential" if block.assumed else "")


def _depends_on_training(module: nn.Module) -> str | None:
    """A rewritten forward is one graph: it must be the same in train and in eval mode."""
    training, codes = module.training, set()
    try:
        for module.training in (False, True):
            codes.add(str(_trace_once(module)[0]))
    finally:
        module.training = training
    return "its forward depends on the training flag" if len(codes) > 1 else None
