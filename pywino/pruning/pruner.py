# SPDX-License-Identifier: BSD-3-Clause
"""`Pruner` makes masks step by step and holds them while the model trains; `prune_` is one step."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from pywino.nn.winograd import WinogradConv2d, WinogradReLUConv2d
from pywino.pruning.specs import NM, check_domain, check_spec

# The densities of Liu et al. (ICLR 2018) as sparsities, for `schedule`: prune, retrain, prune, …
LIU_SCHEDULE = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)

FilterFn = Callable[[nn.Module, str], bool]
_active: weakref.WeakSet[Pruner] = weakref.WeakSet()
_watching = False


class Pruner:
    """Prunes the convolutions of a model in steps, and keeps what is pruned at zero in between.

        pruner = Pruner(model, Magnitude(0.9), schedule=[0.5, 0.7, 0.8, 0.9])
        while not pruner.done:
            pruner.step()      # more zeros
            train(model)       # they stay zeros
        pruner.finalize()

    Args:
        model: its `nn.Conv2d`s are pruned (domain "spatial"), or its `WinogradReLUConv2d`s and
            `WinogradConv2d`s (domain "winograd"). Classes and keys stay, but that a
            `WinogradConv2d` in the Winograd domain has the parameter `winograd_weight`, (K, C,
            tile + 2, tile + 2), instead of `weight`: make the optimizer afterwards.
        spec: `Magnitude`, `NM` or `Block`.
        schedule: the sparsity after each step, in [0, 1) and never falling; None is one step to the
            spec's own.
        domain: "spatial" | "winograd".
        tile: of the `WinogradConv2d`s that go into the Winograd domain: 2, 4 or 6.
        filter_fn: filter_fn(module, name) says whether a layer is pruned.

    Weights are zeroed in place; what was pruned stays pruned in later steps. Gradients of pruned
    weights are zero, and after each step of any optimizer these weights are set to zero again,
    whatever its momentum or weight decay did.

    Raises:
        RuntimeError: nothing to prune, a weight that is not finite or not a plain Parameter, a bad
            schedule, a step too many; a checkpoint that has weights where the masks have none.
        TypeError: something that is no spec.
    """

    def __init__(
        self,
        model: nn.Module,
        spec,
        schedule: Sequence[float] | None = None,
        *,
        domain: str = "spatial",
        tile: int = 4,
        filter_fn: FilterFn | None = None,
    ):
        check_spec("pruning.Pruner", spec)
        check_domain("pruning.Pruner", domain)
        stages = _checked_schedule(spec, schedule)
        layers = _select(model, domain, filter_fn)
        if domain == "winograd":
            for module in layers.values():
                if isinstance(module, WinogradConv2d):
                    module.to_winograd_domain_(tile)
        self._set_up(model, spec, stages, domain, layers)

    def _set_up(self, model, spec, schedule, domain, layers):
        self.model = model
        self.spec = spec
        self.schedule = schedule
        self.domain = domain
        self.position = 0  # steps that were made
        self.masks: dict[str, Tensor] = {}
        self._layers = layers
        self._hooked: dict[str, tuple] = {}  # name -> (weakref to the Parameter, hook)
        self._guards = [
            handle
            for name, module in layers.items()
            for handle in (
                module.register_load_state_dict_pre_hook(_Guard(self, name)),
                module.register_load_state_dict_post_hook(_Follow(self)),
            )
        ]
        self._finalized = False

    @classmethod
    def from_masks(cls, model: nn.Module, masks: Mapping[str, Tensor], domain: str = "spatial"):
        """A Pruner that holds masks made elsewhere: layer's name -> bool tensor of the weight's
        shape, True where the weight is kept. It zeroes the rest now and has no steps to make."""
        check_domain("pruning.Pruner.from_masks", domain)
        names = [name for name, module in model.named_modules() if _belongs(module, domain)]
        for name in masks:
            if name not in names:
                raise RuntimeError(
                    f"pywino.pruning.Pruner.from_masks: masks must name layers of the {domain} "
                    f"domain, got {name!r}; the model has {', '.join(names) or 'none of these'}"
                )
        layers = _select(model, domain, lambda module, name: name in masks)
        pruner = cls.__new__(cls)
        pruner._set_up(model, None, (), domain, layers)
        pruner._check_masks("from_masks", masks)
        pruner.masks = {name: mask.clone() for name, mask in masks.items()}
        pruner._hold()
        return pruner

    @classmethod
    def from_torch(cls, model: nn.Module):
        """A Pruner that takes over the masks of `torch.nn.utils.prune` (`weight_mask`) and of
        `torch.ao.pruning` (its `FakeSparsity` parametrization). The layers become plain
        convolutions again, with zeros in their weights."""
        found = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.Conv2d):
                continue
            if "weight_mask" in module._buffers:
                found[name] = module, module.weight_mask
            elif parametrize.is_parametrized(module, "weight"):
                kinds = list(module.parametrizations.weight)
                if [type(kind).__name__ for kind in kinds] == ["FakeSparsity"]:
                    found[name] = module, kinds[0].mask
        if not found:
            raise RuntimeError(
                "pywino.pruning.Pruner.from_torch: model must have convolutions with masks of "
                "torch.nn.utils.prune or torch.ao.pruning, got none; use pywino.pruning.Pruner"
            )
        masks = {}
        for name, (module, mask) in found.items():
            masks[name] = (mask != 0).clone()
            if "weight_mask" in module._buffers:
                prune.remove(module, "weight")
            else:
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        return cls.from_masks(model, masks)

    @property
    def done(self) -> bool:
        """Whether every step of the schedule was made."""
        return self.position == len(self.schedule)

    @property
    def sparsity(self) -> float:
        """The part of all weights under masks that is pruned now; 0 before the first step."""
        total = sum(mask.numel() for mask in self.masks.values())
        kept = sum(int(mask.count_nonzero()) for mask in self.masks.values())
        return 1 - kept / total if total else 0.0

    @torch.no_grad()
    def step(self) -> float:
        """Prunes to the schedule's next sparsity; returns what was reached."""
        self._check_active("step")
        if self.done:
            raise RuntimeError(
                f"pywino.pruning.Pruner.step: the schedule has {len(self.schedule)} steps, and all "
                "are made; finalize(), or make a Pruner with a longer schedule"
            )
        weights = {name: self._weight(name) for name in self._layers}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise RuntimeError(
                    f"pywino.pruning.Pruner.step: the weights of {name!r} must be finite, got NaN "
                    "or infinity; load a checkpoint from before the training diverged"
                )
        spec = self.spec
        if not isinstance(spec, NM):
            spec = dataclasses.replace(spec, sparsity=self.schedule[self.position])
        self.masks = spec.masks(weights, self.masks, self.domain)
        self.position += 1
        self._hold()
        return self.sparsity

    def finalize(self) -> nn.Module:
        """Takes every hook away and returns the model. Zeros stay until something trains them."""
        for _, hook in self._hooked.values():
            hook.remove()
        for guard in self._guards:
            guard.remove()
        self._hooked, self._guards = {}, []
        self._finalized = True
        _active.discard(self)
        return self.model

    def state_dict(self) -> dict:
        """Spec, schedule, position and masks, for torch.save (weights_only works). Save the model's
        beside it."""
        return {
            "spec": repr(self.spec),
            "schedule": list(self.schedule),
            "domain": self.domain,
            "position": self.position,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken. Load the model's own checkpoint first.

        Raises RuntimeError for a state of another spec, schedule or model, and where the model has
        weights that the masks would silently zero."""
        self._check_active("load_state_dict")
        own = self.state_dict()
        if not isinstance(state, dict) or own.keys() != state.keys():
            raise RuntimeError(
                "pywino.pruning.Pruner.load_state_dict: state must be from Pruner.state_dict(), "
                f"got {type(state).__name__}"
            )
        for key in ("spec", "schedule", "domain"):
            if own[key] != state[key]:
                raise RuntimeError(
                    f"pywino.pruning.Pruner.load_state_dict: {key} must be {own[key]!r}, got "
                    f"{state[key]!r}; make the Pruner with the {key} of the checkpoint"
                )
        masks = state["masks"]
        if masks and masks.keys() != self._layers.keys():
            name = sorted(masks.keys() ^ self._layers.keys())[0]
            raise RuntimeError(
                "pywino.pruning.Pruner.load_state_dict: masks must be of this Pruner's layers, got "
                f"a difference at {name!r}; use the model and filter_fn of the checkpoint"
            )
        self._check_masks("load_state_dict", masks)
        for name, mask in masks.items():
            self._check_zeros("load_state_dict", name, mask, self._weight(name))
        self.masks = {
            name: mask.to(self._weight(name).device, copy=True) for name, mask in masks.items()
        }
        self.position = state["position"]
        self._hold()

    # --- what holds the masks ---

    def _weight(self, name: str) -> Tensor:
        return getattr(self._layers[name], _weight_key(self._layers[name]))

    @torch.no_grad()
    def _hold(self) -> None:
        """Zeroes what is pruned, and has its gradients zeroed."""
        _watch_optimizers()
        _active.add(self)
        for name, mask in self.masks.items():
            weight = self._weight(name)
            if mask.device != weight.device:
                mask = self.masks[name] = mask.to(weight.device)
            weight.masked_fill_(~mask, 0)
            parameter, hook = self._hooked.get(name, (lambda: None, None))
            if parameter() is not weight:
                if hook is not None:
                    hook.remove()
                # A frozen weight keeps its hook until it is trained.
                trained = weight.requires_grad
                weight.requires_grad_(True)
                hook = weight.register_hook(lambda grad, name=name: self._masked(grad, name))
                weight.requires_grad_(trained)
                self._hooked[name] = weakref.ref(weight), hook

    def _masked(self, grad: Tensor, name: str) -> Tensor:
        return grad.masked_fill(~self.masks[name].to(grad.device), 0)

    # --- refusals ---

    def _check_active(self, function: str) -> None:
        if self._finalized:
            raise RuntimeError(
                f"pywino.pruning.Pruner.{function}: this Pruner is finalized; make another"
            )

    def _check_masks(self, function: str, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            shape = tuple(self._weight(name).shape)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise RuntimeError(
                    f"pywino.pruning.Pruner.{function}: the mask of {name!r} must be a bool "
                    f"tensor, got {got}; pass mask != 0"
                )
            if tuple(mask.shape) != shape:
                raise RuntimeError(
                    f"pywino.pruning.Pruner.{function}: the mask of {name!r} must be {shape}, its "
                    f"weight's shape, got {tuple(mask.shape)}; expand it"
                )

    def _check_zeros(self, function: str, name: str, mask: Tensor, weight: Tensor) -> None:
        pruned = (weight != 0) & ~mask.to(weight.device)
        if pruned.any():
            k = int(pruned.flatten(1).any(1).nonzero()[0])
            raise RuntimeError(
                f"pywino.pruning.Pruner.{function}: the weights of {name!r} must be zero where its "
                f"mask has pruned, got others, first in filter {k}: a dense checkpoint in a pruned "
                "model. Load the pruned model's own checkpoint first (to go back to an earlier "
                "one, the Pruner's state first), or finalize() this Pruner to train the model dense"
            )


class _Follow:
    """Has new Parameters (`load_state_dict(assign=True)`) masked as the old ones were. A copy or
    pickle of the layer belongs to no Pruner."""

    def __init__(self, pruner: Pruner | None = None):
        self.pruner = weakref.ref(pruner) if pruner is not None else lambda: None

    def __call__(self, module, incompatible_keys) -> None:
        if (pruner := self.pruner()) is not None:
            pruner._hold()

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()


class _Guard(_Follow):
    """Refuses a checkpoint that an active Pruner's masks would silently zero, before anything of
    it is in the layer."""

    def __init__(self, pruner: Pruner | None = None, name: str = ""):
        super().__init__(pruner)
        self.name = name

    def __call__(self, module, state_dict, prefix, *_) -> None:
        pruner = self.pruner()
        if pruner is None or self.name not in pruner.masks:
            return
        weight, mask = state_dict.get(prefix + _weight_key(module)), pruner.masks[self.name]
        if isinstance(weight, Tensor) and weight.shape == mask.shape:  # else PyTorch has its error
            pruner._check_zeros("load_state_dict of the model", self.name, mask, weight)


def _watch_optimizers() -> None:
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer, args, kwargs) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for pruner in list(_active):
        if any(id(pruner._weight(name)) in trained for name in pruner.masks):
            pruner._hold()


def prune_(
    model: nn.Module,
    spec,
    *,
    domain: str = "spatial",
    tile: int = 4,
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    """Zeroes weights of the model's convolutions by `spec`, in place, and returns the model.

    It is a `pywino.pruning.Pruner` stepped once and finalized; the arguments and errors are its
    own. Nothing holds the zeros afterwards: to train on, use a Pruner."""
    pruner = Pruner(model, spec, domain=domain, tile=tile, filter_fn=filter_fn)
    pruner.step()
    return pruner.finalize()


def check(model: nn.Module, spec, *, domain: str = "spatial") -> None:
    """Raises RuntimeError, which names the layer and its first offending filter, where a layer of
    the domain does not have the pattern of `spec`."""
    check_spec("pruning.check", spec)
    check_domain("pruning.check", domain)
    for name, module in _select(model, domain, None).items():
        key = _weight_key(module)
        found = spec.violation(getattr(module, key), domain)
        if found is not None:
            raise RuntimeError(
                f"pywino.pruning.check: {_named(name)} must have the pattern of {spec}, got filter "
                f"{found[0]} without it: {found[1]}; prune it with pywino.prune_"
            )


# --- which layers ---


def _named(name: str) -> str:
    return repr(name) if name else "the model"


def _weight_key(module: nn.Module) -> str:
    return "winograd_weight" if "winograd_weight" in module._parameters else "weight"


def _select(model, domain, filter_fn) -> dict[str, nn.Module]:
    """The layers of a domain by name."""
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise TypeError(f"pywino.pruning: model must be a torch.nn.Module, got {got}")
    layers = {}
    for name, module in model.named_modules():
        if not _belongs(module, domain) or (filter_fn is not None and not filter_fn(module, name)):
            continue
        weight = module._parameters.get(_weight_key(module))
        if not isinstance(weight, nn.Parameter):
            raise RuntimeError(
                f"pywino.pruning: the weight of {_named(name)} must be a plain Parameter, got one "
                "that is computed from something else; use Pruner.from_torch(model) for masks of "
                "torch.nn.utils.prune and torch.ao.pruning, or leave it out by filter_fn"
            )
        layers[name] = module
    if not layers:
        kinds = (
            "torch.nn.Conv2d"
            if domain == "spatial"
            else "WinogradReLUConv2d and 3x3 WinogradConv2d (use pywino.swap_ or convert_ first)"
        )
        raise RuntimeError(
            f"pywino.pruning: model must have layers to prune, got none; in the {domain} domain "
            f"these are {kinds}"
        )
    return layers


def _belongs(module: nn.Module, domain: str) -> bool:
    if domain == "spatial":
        return isinstance(module, nn.Conv2d) and "winograd_weight" not in module._parameters
    if isinstance(module, WinogradConv2d):
        return module.fits_winograd_domain
    return isinstance(module, WinogradReLUConv2d)


def _checked_schedule(spec, schedule) -> tuple[float, ...]:
    if schedule is None:
        return (spec.sparsity,)
    if isinstance(spec, NM):
        raise RuntimeError(
            f"pywino.pruning.Pruner: schedule must be None for {spec}, which has one sparsity; use "
            "Magnitude or Block for steps"
        )
    stages = tuple(schedule)
    for stage in stages:
        dataclasses.replace(spec, sparsity=stage)  # raises for one outside of [0, 1)
    if not stages or any(b < a for a, b in itertools.pairwise(stages)):
        raise RuntimeError(
            "pywino.pruning.Pruner: schedule must be one sparsity or more, none smaller than the "
            f"one before, got {stages}; densities are 1 - sparsity"
        )
    return stages
