# SPDX-License-Identifier: BSD-3-Clause
"""swap_, restore_, plan and explain: one layer for another, in a model that stays as it is."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from pywino.swap.configs import BUILT, HANDLERS, Handler, handler_of, warn
from pywino.swap.report import Explanation, Layer, Report, explanation, reasons

logger = logging.getLogger("pywino.swap")
_LAST_REPORTS: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()

FilterFn = Callable[[nn.Module, str], bool]


def swap_(
    model: nn.Module,
    config: object | dict[str, object] | None = None,
    *,
    example: Any = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Puts pywino's layers where torch's are, in place, and returns the model.

    Parameters, names, hooks, training flags, device and dtype stay the same objects, so optimizers,
    DDP and checkpoints (both ways) go on working. If the model itself is a `Conv2d`, the returned
    module is a new one with its parameters. What was done is `last_report(model)`; `plan` says it
    beforehand, `restore_` undoes it. Swapping twice is swapping once.

    config: None for every kernel that keeps the function and the error class; a config such as
        `Winograd(tile=4)`; or a dict of globs over the layers' names, first match wins, None leaves
        alone: `{"layer1.*": None, "*": Winograd()}`.
    example: an input of the model (a tensor, a tuple of arguments, or a dict of keyword arguments).
        With it every layer is measured now, in eval mode; without it each new signature is measured
        at its first call.
    filter_fn(module, fqn): False leaves the layer alone.
    strict: a selected layer that cannot be swapped raises, and nothing is changed.
    progress: a progress bar on stderr; None shows it where stderr is a terminal.

    Raises RuntimeError (strict, or an example with a model that has uninitialised lazy layers) and
    TypeError (no such config; `WinogradReLU`, which changes the function: see `convert_`). Warns
    when nothing was changed, and about globs that match no layer.
    """
    decisions = _decide(model, config, filter_fn, "swap_")
    if strict:
        _raise_for_refused(decisions, "swap_")
    if example is not None:
        check_runnable(model, "swap_")
    swapped = {}
    for decision in decisions:
        if decision.action == "swap":
            new = decision.handler.make(decision.module, decision.config)
            rebind_hooks(new)
            swapped[id(decision.module)] = decision.module = new
        elif decision.action == "update":
            decision.handler.update(decision.module, decision.config)
    model = replace_modules(model, swapped)

    report = Report([decision.row() for decision in decisions], "swap_")
    remember(model, report)
    if not any(decision.handler for decision in decisions):
        warn(f"pywino.swap_ changed nothing: {_why_nothing(decisions)}")
    elif example is not None:
        layers = {d.module: d.fqn for d in decisions if d.handler}
        with untouched(model), _progress(len(layers), "measuring", progress) as advance:
            waiting = dict(layers)

            def called(module: nn.Module, args: Any, output: Any) -> None:
                if waiting.pop(module, None) is not None:
                    advance(layers[module])

            for module in layers:
                module.register_forward_hook(called)
            call(model, example)
    return model


def restore_(model: nn.Module, strict: bool = False) -> nn.Module:
    """Puts torch's layers where pywino's are, swapped or built so, in place, and returns the model.

    Parameters stay the same objects with all training that was done on them. A ReLU or residual add
    that `fuse_` moved into a layer comes back as a torch operation; a folded BatchNorm stays
    folded. Layers that have no counterpart in torch (`WinogradReLUConv2d`) stay and are named in a
    warning; with strict they raise, and nothing is changed.
    """
    from pywino.swap.graph import fused_elsewhere, unfuse

    # Subclasses before their base, so that the first match is the nearest.
    kinds = [*BUILT, *(handler.layer for handler in HANDLERS.values())]
    dense, rows = [], []
    homeless_relu = fused_elsewhere(model)
    for module, names in named_layers(model):
        layer = next((kind for kind in kinds if isinstance(module, kind)), None)
        if layer is None:
            continue
        if type(module) is not layer:
            reason = f"it is a {type(module).__name__}, a subclass or parametrized"
        elif not hasattr(layer, "to_dense"):
            reason = "torch has no such layer"
        elif getattr(module, "domain", "spatial") == "winograd":
            reason = "its weight is in the Winograd domain"
        elif id(module) in homeless_relu:
            reason = "it has a ReLU of its own, which a Conv2d has not"
        else:
            reason = ""
            dense.append(module)
        rows.append(
            Layer(names[0], type(module).__name__, "leave" if reason else "restore", reason)
        )

    left = [f"{row.fqn or '(root)'}: {row.reason}" for row in rows if row.action == "leave"]
    if left and strict:
        raise RuntimeError(
            "pywino.restore_: these layers have no counterpart in torch: " + "; ".join(left)
        )
    unfuse(model)
    restored = {id(module): module.to_dense() for module in dense}
    for new in restored.values():
        rebind_hooks(new)
    model = replace_modules(model, restored)
    remember(model, Report(rows, "restore_"))
    if left:
        warn(
            "pywino.restore_ left these layers, which have no counterpart in torch: "
            + "; ".join(left)
        )
    return model


def plan(
    model: nn.Module,
    config: object | dict[str, object] | None = None,
    *,
    example: Any = None,
    filter_fn: FilterFn | None = None,
    progress: bool | None = None,
) -> Report:
    """What `swap_` (for `WinogradReLU`: `convert_`) would do, as a `Report`. Changes nothing.

    Every convolution has a row: action and reason. With an example the model is called once, in
    eval mode without gradients, and every layer to be swapped is measured on the inputs that it
    gets: PyTorch's kernel (`before`), every candidate, the chosen one (`after`), and the chosen one
    on channels_last inputs. Random state, buffers, attributes and training flags are put back, also
    when the model raises. Arguments as in `swap_`.
    """
    configs = list(config.values()) if isinstance(config, dict) else [config]
    handlers = [handler_of(c, "plan") for c in configs if c is not None]
    if handlers and not any(handler.keeps_function for handler in handlers):
        from pywino.swap.graph import plan_conversion

        return plan_conversion(model, config, filter_fn)
    decisions = _decide(model, config, filter_fn, "plan")
    if example is None:
        return Report([decision.row() for decision in decisions], "plan")
    return Report(_measure(model, decisions, example, progress, "plan"), "plan")


def explain(
    model_or_layer: nn.Module, example: Any, *, progress: bool | None = None
) -> Explanation:
    """Every candidate of every layer, with its time or why it has none; `>` marks the chosen one.

    Takes a model or a single layer, swapped or not (then: what `swap_` would choose from), and an
    example input as in `swap_`. Returns a string to print; its `.report` and `.to_dict()` hold the
    same as data. The model is not changed.
    """
    decisions = _decide(model_or_layer, None, None, "explain")
    for decision in decisions:
        if decision.action in ("update", "already"):  # a swapped layer is explained as it is
            decision.action, decision.config = "already", None
    rows = _measure(model_or_layer, decisions, example, progress, "explain")
    return explanation(Report(rows, "explain"))


def last_report(model: nn.Module) -> Report | None:
    """The report of the last swap_, restore_, fuse_ or convert_ that returned this model."""
    return _LAST_REPORTS.get(model)


def remember(model: nn.Module, report: Report) -> None:
    _LAST_REPORTS[model] = report
    logger.info("%s", report)


# --- which layers ---


@dataclass
class _Decision:
    """What happens to one module. refused: the user asked for it, and no handler takes it."""

    fqn: str
    module: nn.Module
    kind: str
    action: str
    reason: str = ""
    handler: Handler | None = None
    config: object = None
    refused: bool = False

    def row(self) -> Layer:
        return Layer(self.fqn, self.kind, self.action, self.reason)


def named_layers(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Every module once, with all its names, in the model's order."""
    names: dict[nn.Module, list[str]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(fqn)
    yield from names.items()


def select(
    model: nn.Module,
    config: object,
    filter_fn: FilterFn | None,
    op: str,
    keeps_function: bool = True,
) -> Iterator[tuple[nn.Module, list[str], list[object], str]]:
    """(module, its names, the configs that it may get, why none) for every module that a handler
    speaks of.
    """
    rules = _rules(config, op, keeps_function)
    spoken_of = tuple({HANDLERS[type(c)].speaks_of for _, configs in rules for c in configs}) or (
        nn.Conv2d,
    )
    unused = [glob for glob, _ in rules]
    for module, names in named_layers(model):
        scripted = getattr(module, "original_name", None) in [kind.__name__ for kind in spoken_of]
        if not isinstance(module, spoken_of) and not scripted:
            continue
        matches = [rule for rule in rules if any(fnmatchcase(name, rule[0]) for name in names)]
        if matches and matches[0][0] in unused:
            unused.remove(matches[0][0])
        why_none = ""
        if not matches:
            why_none = "no glob matches its name"
        elif not matches[0][1]:
            why_none = f"{matches[0][0]!r} says None"
        elif filter_fn is not None and not all(filter_fn(module, name) for name in names):
            why_none = "filter_fn says no"
        yield module, names, [] if why_none else matches[0][1], why_none
    if isinstance(config, dict) and unused:
        warn(f"pywino.{op}: no layer was chosen by {', '.join(map(repr, unused))}")


def _rules(config: object, op: str, keeps_function: bool) -> list[tuple[str, list[object]]]:
    """(glob, configs to try in this order), first match wins."""
    if config is None:
        return [
            ("*", [kind() for kind, h in HANDLERS.items() if h.keeps_function == keeps_function])
        ]
    table = config if isinstance(config, dict) else {"*": config}
    for glob, value in table.items():
        if not isinstance(glob, str):
            raise TypeError(
                f"pywino.{op}: the keys of config must be globs over names, got {glob!r}"
            )
        if value is not None and handler_of(value, op).keeps_function != keeps_function:
            does, other = ("changes", "convert_") if keeps_function else ("keeps", "swap_")
            raise TypeError(
                f"pywino.{op}: {value!r} {does} the function of a layer; use pywino.{other}"
            )
    return [(glob, [] if value is None else [value]) for glob, value in table.items()]


def _decide(
    model: nn.Module, config: object, filter_fn: FilterFn | None, op: str
) -> list[_Decision]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"pywino.{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    decisions = []
    for module, names, configs, why_none in select(model, config, filter_fn, op):
        decision = _Decision(names[0], module, type(module).__name__, "leave", why_none)
        decisions.append(decision)
        if configs:
            _choose_handler(decision, names, configs)
        if len(names) > 1:
            also = f"the same module as {', '.join(names[1:])}"
            decision.reason = f"{decision.reason}; {also}" if decision.reason else also
    return decisions


def _choose_handler(decision: _Decision, names: list[str], configs: list[object]) -> None:
    module, refusals = decision.module, []
    if any(name.split(".")[-1] == "_orig_mod" for name in names):
        refusals.append("it was compiled on its own; swap before compiling")
        configs = []
    for config in configs:
        handler = HANDLERS[type(config)]
        if not isinstance(module, (handler.speaks_of, torch.jit.ScriptModule)):
            if len(configs) == 1:
                refusals.append(f"{type(config).__name__} is for {handler.speaks_of.__name__}")
            continue
        if type(module) is handler.layer:
            action = "already" if handler.matches(module, config) else "update"
            decision.action, decision.handler, decision.config = action, handler, config
            return
        reason = handler.refuse(module, config)
        if reason is None:
            decision.action, decision.handler, decision.config = "swap", handler, config
            return
        if not handler.quiet or len(configs) == 1:
            refusals.append(reason)
    if type(module) in [*BUILT, *(handler.layer for handler in HANDLERS.values())]:
        refusals = ["it is a layer of pywino of another kind"]
    decision.reason = "; ".join(dict.fromkeys(refusals))
    decision.refused = True


def _raise_for_refused(decisions: list[_Decision], op: str) -> None:
    refused = [decision for decision in decisions if decision.refused]
    if refused:
        raise RuntimeError(
            f"pywino.{op}(strict=True): these selected layers stay as they are, and nothing was "
            f"changed: {reasons(refused, len(refused))}. "
            "Leave them out by filter_fn or a glob with None, or drop strict."
        )
    if not any(d.handler for d in decisions):
        raise RuntimeError(
            f"pywino.{op}(strict=True): nothing to change: {_why_nothing(decisions)}"
        )


def _why_nothing(decisions: list[_Decision]) -> str:
    return reasons(decisions) or "the model has no torch.nn.Conv2d"


# --- changing the tree ---


def replace_modules(root: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    """Puts `new[id(old)]` wherever `old` is, so that a shared module stays one module. Returns the
    root, new or old.
    """
    root = new.get(id(root), root)
    waiting, seen = [root], {id(root)}
    while waiting:
        children = waiting.pop()._modules
        for name, child in children.items():
            if child is None:
                continue
            if id(child) in new:
                children[name] = child = new[id(child)]
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return root


def rebind_hooks(module: nn.Module) -> None:
    """load_state_dict pre-hooks hold their module by a weak reference: it must be the one that is
    in the tree now.
    """
    for hook in module._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(module)


# --- running the example ---


def call(model: nn.Module, example: Any) -> None:
    if isinstance(example, dict):
        model(**example)
    elif isinstance(example, (tuple, list)):
        model(*example)
    else:
        model(example)


def check_runnable(model: nn.Module, op: str) -> None:
    for fqn, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise RuntimeError(
                f"pywino.{op}: {fqn or 'the model'} is a lazy layer without parameters yet; run "
                "the model once first, or call without an example"
            )


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, uncompiled; afterwards everything is as it was.

    That is: attributes (hooks among them), buffers, training flags and random states.
    """
    modules = list(model.modules())
    attributes = Attributes(modules)
    buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    copies = [buffer.clone() for buffer in buffers]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        for module in modules:
            module.training = False  # not eval(): a train() of the user's own may do more
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            _uncompiled(),
        ):
            yield
    finally:
        attributes.restore()
        with torch.no_grad():
            for buffer, before in zip(buffers, copies):
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _uncompiled() -> contextlib.AbstractContextManager:
    """Hooks in compiled models are called in eager only."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class Attributes:
    """What modules have in their attributes, lists, dicts and sets among them, now; `restore` puts
    it back.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.saved = []
        for module in modules:
            containers = [
                value for value in vars(module).values() if isinstance(value, (list, dict, set))
            ]
            self.saved += [
                (container, copy.copy(container)) for container in [vars(module), *containers]
            ]

    def restore(self) -> bool:
        """Says whether anything had changed."""
        changed = False
        for container, before in self.saved:
            if len(container) == len(before) and all(
                map(operator.is_, _items(container), _items(before))
            ):
                continue
            changed = True
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        return changed


def _items(container: list | dict | set) -> Iterator:
    return (
        itertools.chain.from_iterable(container.items())
        if isinstance(container, dict)
        else iter(container)
    )


@contextlib.contextmanager
def _progress(total: int, what: str, wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """advance(name) moves a bar on stderr, when it is wanted and rich is there."""
    if wanted is None:
        wanted = sys.stderr.isatty()
    try:
        if not wanted:
            raise ImportError
        from rich.console import Console
        from rich.progress import Progress
        from rich.text import Text
    except ImportError:
        yield lambda name: None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name: bar.update(task, advance=1, description=f"{what} {Text(name).markup}")


def _measure(
    model: nn.Module, decisions: list[_Decision], example: Any, progress: bool | None, op: str
) -> list[Layer]:
    """The rows of the decisions, with the times of what the example makes each layer do."""
    check_runnable(model, op)
    rows = {decision.module: decision.row() for decision in decisions}
    measured = [d for d in decisions if d.handler is not None and d.handler.measure is not None]
    waiting = {decision.module for decision in measured}
    with untouched(model), _progress(len(measured), "measuring", progress) as advance:

        def hook(decision: _Decision) -> Callable:
            def measure(module: nn.Module, args: tuple, kwargs: dict) -> None:
                decision.handler.measure(module, decision.config, args, kwargs, rows[module])
                if module in waiting:
                    waiting.remove(module)
                    advance(decision.fqn)

            return measure

        for decision in measured:
            decision.module.register_forward_pre_hook(hook(decision), with_kwargs=True)
        call(model, example)
    for module in waiting:
        row = rows[module]
        row.reason = "; ".join(filter(None, [row.reason, "the example does not reach it"]))
    return list(rows.values())
