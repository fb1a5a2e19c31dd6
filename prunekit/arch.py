"""Finds the MLPs of a model and shows each as a uniform `MLPView`, parameters by reference.

A layout recognises modules by the names and shapes of their projections, never by a list of model
names; what it recognised is then run once against the formula, so a module that looks right but
computes something else is an error and not a wrong result.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from prunekit.errors import InputError
from prunekit.files import digest
from prunekit.ops.activations import ACTIVATIONS, activate, activation_code

_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
_PLAIN_PAIRS = (
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc_in", "fc_out"),
    ("up_proj", "down_proj"),
)


@dataclass(frozen=True)
class Slot:
    """Where the neurons of one projection lie: a run along one axis of one parameter.

    ``axis`` counts within the matrix (after the expert was picked); 0 for a bias.
    """

    owner: nn.Module
    name: str
    axis: int
    start: int = 0
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.owner, self.name)

    def read(self, width: int) -> torch.Tensor:
        """The neurons as they lie, a view: no copy."""
        p = self.parameter if self.expert is None else self.parameter[self.expert]
        return p.narrow(self.axis, self.start, width)


def running_device(owner: nn.Module, parameter: torch.Tensor) -> torch.device:
    """Where a module computes: by accelerate's hook, if its parameter is not in memory."""
    hook = getattr(owner, "_hf_hook", None)
    elsewhere = getattr(hook, "execution_device", None) if parameter.is_meta else None
    return parameter.device if elsewhere is None else torch.device(elsewhere)


def input_device(model: nn.Module) -> torch.device:
    """Where a model expects token ids."""
    embedding = model.get_input_embeddings()
    return running_device(embedding, embedding.weight)


@dataclass(frozen=True)
class MLPView:
    """One MLP of a model: h = act(gate(x))·up(x), or h = act(gate(x)) where there is no up.

    ``gate`` and ``up`` read as [F, D], ``down`` as [D, F], whatever the model's own layout; they
    are views, so writing to them writes to the model.
    """

    layer: int
    name: str
    kind: str
    act: str
    module: nn.Module
    width_key: str
    slots: dict[str, Slot]
    down_owner: nn.Module
    act_name: str | None = None
    expert: int | None = None

    @property
    def width(self) -> int:
        """F, the number of neurons."""
        slot = self.slots["down"]
        p = slot.parameter if slot.expert is None else slot.parameter[slot.expert]
        return p.shape[slot.axis]

    def _matrix(self, role: str, neuron_axis: int) -> torch.Tensor | None:
        slot = self.slots.get(role)
        if slot is None:
            return None
        matrix = slot.read(self.width)
        return matrix if slot.axis == neuron_axis else matrix.T

    @property
    def readable(self) -> bool:
        """Whether its weights are numbers in memory: neither offloaded nor quantised."""
        return not self.gate.is_meta and self.gate.is_floating_point()

    @property
    def device(self) -> torch.device:
        """Where it computes, which of an offloaded one is not where its weights are."""
        return running_device(self.slots["gate"].owner, self.gate)

    @property
    def gate(self) -> torch.Tensor:
        return self._matrix("gate", 0)

    @property
    def up(self) -> torch.Tensor | None:
        return self._matrix("up", 0)

    @property
    def down(self) -> torch.Tensor:
        return self._matrix("down", 1)

    @property
    def gate_bias(self) -> torch.Tensor | None:
        return self._matrix("gate_bias", 0)

    @property
    def up_bias(self) -> torch.Tensor | None:
        return self._matrix("up_bias", 0)

    @property
    def down_bias(self) -> nn.Parameter | None:
        return getattr(self.down_owner, "bias", None) if self.kind != "experts" else None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The formula, in plain torch: [T, D] -> [T, D]."""
        return F.linear(self.activations(x), self.down, self.down_bias)

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """h for x: [T, D] -> [T, F]."""
        h = activate(F.linear(x, self.gate, self.gate_bias), activation_code(self.act))
        if self.up is not None:
            h = h * F.linear(x, self.up, self.up_bias)
        return h


Layout = Callable[[str, nn.Module, nn.Module], "list[MLPView] | None"]
_LAYOUTS: list[Layout] = []


def register_arch(layout: Layout) -> Layout:
    """Teach prunekit an MLP it does not know; layouts registered last are asked first.

    Args:
        layout: called as ``layout(name, module, model)`` for every module of the decoder; returns
            the module's views, or None if the module is no MLP of its kind.
    """
    _LAYOUTS.insert(0, layout)
    return layout


def text_config(model: nn.Module):
    """The configuration of the language model (multimodal models nest it)."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def parameter_names(model: nn.Module) -> dict[tuple[int, str], str]:
    """Every parameter's name by where it hangs: its module's id, and the attribute.

    Not by what it is: pruning puts other parameters in its place.
    """
    return {
        (id(module), attribute): f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, _ in module.named_parameters(recurse=False)
    }


def cache_keyword(model: nn.Module) -> str:
    """By what name a model's forward takes and returns its cache: transformers renamed it."""
    accepted = inspect.signature(model.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


def holds_attention(module: nn.Module) -> bool:
    """Whether what holds an MLP's projections is a whole layer, as in OPT, with its attention."""
    return any("attn" in name for name, _ in module.named_children())


def layer_config(config, layer: int):
    """What a configuration says of one layer, whose MLP may have a width of its own."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def _layer_number(name: str) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else 0


def _width_key(name: str, width: int, model: nn.Module, candidates: tuple[str, ...]) -> str:
    config = layer_config(text_config(model), _layer_number(name))
    for key in candidates:
        if not hasattr(config, key):
            continue
        value = getattr(config, key)
        if width == (4 * config.hidden_size if value is None else value):  # None: four times D
            return key
        if hasattr(model, "prunekit"):  # pruned to widths that differ by layer: no key says them
            return key
    raise InputError(
        f"{name}: its {width} neurons match none of the configuration's "
        f"{', '.join(candidates)}; register_arch can teach prunekit this model"
    )


_DENSE_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def _find_activation(name: str, module: nn.Module) -> tuple[str, str]:
    """Name the activation by what it computes: (attribute, prunekit's name)."""
    probe = torch.linspace(-4, 4, 101)
    for attribute in _ACTIVATION_NAMES:
        function = getattr(module, attribute, None)
        if not callable(function):
            continue
        value = function(probe)
        for known, reference in ACTIVATIONS.items():
            if torch.allclose(value, reference(probe), atol=1e-6):
                return attribute, known
        raise InputError(
            f"{name}.{attribute}: {type(function).__name__} is none of {', '.join(ACTIVATIONS)}"
        )
    raise InputError(f"{name}: no activation among {', '.join(_ACTIVATION_NAMES)}")


def _is_conv1d(module: nn.Module | None) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' transposed Linear: weight [in, out]


def _bias_slots(slots: dict[str, Slot]) -> dict[str, Slot]:
    """Slots for the biases of gate and up, which neurons own (down's bias belongs to no neuron)."""
    return {
        f"{role}_bias": Slot(slot.owner, "bias", 0, slot.start)
        for role, slot in slots.items()
        if role != "down" and getattr(slot.owner, "bias", None) is not None
    }


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    child = getattr(module, name, None)
    return child if isinstance(child, nn.Linear) else None


def _gated(name: str, module: nn.Module, model: nn.Module) -> list[MLPView] | None:
    gate, up, down = (_linear(module, n) for n in ("gate_proj", "up_proj", "down_proj"))
    if gate is None or up is None or down is None:
        return None
    slots = {
        "gate": Slot(gate, "weight", 0),
        "up": Slot(up, "weight", 0),
        "down": Slot(down, "weight", 1),
    }
    keys = ("shared_expert_intermediate_size",) if "shared_expert" in name else _DENSE_KEYS
    return [_view(name, module, model, "gated", slots, keys)]


def _fused(name: str, module: nn.Module, model: nn.Module) -> list[MLPView] | None:
    gate_up, down = _linear(module, "gate_up_proj"), _linear(module, "down_proj")
    if gate_up is None or down is None:
        return None
    slots = {
        "gate": Slot(gate_up, "weight", 0),
        "up": Slot(gate_up, "weight", 0, start=down.in_features),
        "down": Slot(down, "weight", 1),
    }
    return [_view(name, module, model, "fused", slots, _DENSE_KEYS)]


def _plain(name: str, module: nn.Module, model: nn.Module) -> list[MLPView] | None:
    for first, second in _PLAIN_PAIRS:
        gate, down = getattr(module, first, None), getattr(module, second, None)
        if hasattr(module, "gate_proj"):
            continue
        if isinstance(gate, nn.Linear) and isinstance(down, nn.Linear):
            slots = {"gate": Slot(gate, "weight", 0), "down": Slot(down, "weight", 1)}
            return [_view(name, module, model, "plain", slots, _DENSE_KEYS)]
        if _is_conv1d(gate) and _is_conv1d(down):
            slots = {"gate": Slot(gate, "weight", 1), "down": Slot(down, "weight", 0)}
            return [_view(name, module, model, "conv1d", slots, _DENSE_KEYS)]
    return None


def _experts(name: str, module: nn.Module, model: nn.Module) -> list[MLPView] | None:
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)):
        return None
    if gate_up.dim() != 3 or down.dim() != 3:
        return None
    count, hidden, width = down.shape
    if tuple(gate_up.shape) != (count, 2 * width, hidden):
        return None
    keys = ("moe_intermediate_size", "intermediate_size")
    return [
        _view(
            f"{name}.{e}",
            module,
            model,
            "experts",
            {
                "gate": Slot(module, "gate_up_proj", 0, 0, e),
                "up": Slot(module, "gate_up_proj", 0, width, e),
                "down": Slot(module, "down_proj", 1, 0, e),
            },
            keys,
            expert=e,
        )
        for e in range(count)
    ]


def _view(name, module, model, kind, slots, keys, expert=None) -> MLPView:
    attribute, act = _find_activation(name, module)
    slots = slots if kind == "experts" else {**slots, **_bias_slots(slots)}
    down = slots["down"]
    width = down.parameter.shape[down.axis + (down.expert is not None)]
    return MLPView(
        layer=_layer_number(name),
        name=name,
        kind=kind,
        act=act,
        module=module,
        width_key=_width_key(name, width, model, keys),
        slots=slots,
        down_owner=down.owner,
        act_name=attribute,
        expert=expert,
    )


for _layout in (_plain, _experts, _fused, _gated):
    register_arch(_layout)


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its lm_head."""
    if hasattr(model, "get_decoder"):
        return model.get_decoder()
    return getattr(model, "base_model", model)


def _inside(module: nn.Module, views: list[MLPView]) -> bool:
    return any(part is module for view in views for part in view.module.modules())


def find_mlps(model: nn.Module, *, verify: bool = True) -> list[MLPView]:
    """Find every MLP of a model's decoder, in the order of its modules.

    Args:
        model: a causal language model with a transformers configuration at ``model.config``.
        verify: run one module of each class against its view's formula, on two random tokens.

    Returns:
        One view an MLP; one an expert for mixtures of experts.

    Raises:
        InputError: a layer has no MLP that a layout knows, or a module computes another function.
    """
    decoder = decoder_of(model)
    views: list[MLPView] = []
    for name, module in decoder.named_modules():
        if views and _inside(module, views[-1:]):
            continue
        for layout in _LAYOUTS:
            found = layout(name, module, model)
            if found:
                views.extend(found)
                break
    _check_complete(model, decoder, views)
    if verify:
        verify_views(views)
    return views


def _check_complete(model: nn.Module, decoder: nn.Module, views: list[MLPView]) -> None:
    layers = getattr(text_config(model), "num_hidden_layers", 0)
    missing = sorted(set(range(layers)) - {view.layer for view in views})
    covered = {id(part) for view in views for part in view.module.modules()}
    holders = {id(view.module) for view in views}
    unknown = [
        f"{name} ({type(module).__name__})"
        for name, module in decoder.named_modules()
        if re.search(r"(MLP|Experts|FeedForward|FFN)$", type(module).__name__)
        and id(module) not in covered
        and not any(id(part) in holders for part in module.modules())
    ]
    if not missing and not unknown and views:
        return
    seen = sorted({type(module).__name__ for module in decoder.modules()})
    what = f"unknown: {', '.join(unknown[:3])}" if unknown else f"layers without one: {missing[:8]}"
    raise InputError(
        f"{type(model).__name__}: not every layer has an MLP that prunekit knows ({what}); modules "
        f"seen: {', '.join(seen)}; prunekit.register_arch can teach it this model"
    )


def _random_input(view: MLPView) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, view.gate.shape[1], generator=generator)
    return x.to(view.gate.device, view.gate.dtype)


@torch.no_grad()
def verify_views(views: list[MLPView]) -> None:
    """Run one module of each class against its view's formula, where its weights are in memory.

    Raises:
        InputError: a module computes another function.
    """
    checked: set[type] = set()
    for view in views:
        unreadable = not view.readable or holds_attention(view.module)
        if type(view.module) in checked or unreadable:
            continue
        checked.add(type(view.module))
        x = _random_input(view)
        training = view.module.training
        view.module.eval()
        try:
            got = _run_alone(view, x)
        finally:
            view.module.train(training)
        want = view.apply(x)
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
        if not torch.isfinite(want).all():
            neuron = int((~torch.isfinite(view.activations(x))).any(0).int().argmax())
            raise InputError(
                f"{view.name}: neuron {neuron} gives NaN or Inf in "
                f"{str(x.dtype).removeprefix('torch.')} for inputs of size 1; use bf16 or fp32"
            )
        error = (got - want).float().norm() / want.float().norm().clamp_min(1e-20)
        if not error < tolerance:
            raise InputError(
                f"{view.name}: {type(view.module).__name__} computes something else than "
                f"down(act(gate)·up) (relative error {error:.1e}); register_arch can teach it"
            )


def _run_alone(view: MLPView, x: torch.Tensor) -> torch.Tensor:
    if view.kind != "experts":
        return view.module(x)
    chosen = torch.full((x.shape[0], 1), view.expert, device=x.device)
    return view.module(x, chosen, torch.ones_like(chosen, dtype=x.dtype))


def blocks(views: list[MLPView]) -> Iterator[list[int]]:
    """Group the views that share parameters: the experts of a layer, else each alone. Indices."""
    start = 0
    for i in range(1, len(views) + 1):
        if i == len(views) or views[i].module is not views[start].module:
            yield list(range(start, i))
            start = i


def decoder_layers(model: nn.Module, views: list[MLPView]) -> list[nn.Module]:
    """The decoder layers: the outermost members of module lists that hold an MLP."""
    holders = {id(view.module) for view in views}
    found: list[nn.Module] = []
    covered: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in covered:
            continue
        for layer in module:
            inside = {id(part) for part in layer.modules()}
            if inside & holders:
                found.append(layer)
                covered |= inside
    return found


def members(layer: nn.Module, views: Sequence[MLPView]) -> list[int]:
    """Which of the views lie in a decoder layer: their positions."""
    inside = {id(part) for part in layer.modules()}
    return [i for i, view in enumerate(views) if id(view.module) in inside]


def fingerprint(views: list[MLPView], widths: Sequence[int] | None = None) -> str:
    """A hash of the names, kinds, widths and hidden sizes: the same model pruned gives another.

    Args:
        views: the MLPs of a model.
        widths: F of each to take instead of its own: the dense ones give a pruned model's origin.
    """
    widths = [view.width for view in views] if widths is None else widths
    pairs = zip(views, widths, strict=True)
    return digest([(v.name, v.kind, v.act, width, v.down.shape[0]) for v, width in pairs])


@torch.no_grad()
def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf: one read, without a tensor of booleans as large."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(model: nn.Module, views: list[MLPView]) -> None:
    """Raise InputError if a weight in memory is NaN or Inf, naming the MLP and neuron it is of.

    Cost:
        One read of the weights.
    """
    for view in views:
        if not view.readable:
            continue
        for role, matrix, axis in (
            ("gate", view.gate, 1),
            ("up", view.up, 1),
            ("down", view.down, 0),
        ):
            if matrix is None or all_finite(matrix):
                continue
            neuron = int((~torch.isfinite(matrix)).any(axis).nonzero()[0])
            raise InputError(
                f"{view.name}: the {role} weights of neuron {neuron} are not finite (NaN or Inf); "
                "the model is broken: get its weights anew, or load them in bf16 or fp32"
            )
    seen = {id(slot.parameter) for view in views for slot in view.slots.values()}
    for name, parameter in model.named_parameters():
        known = id(parameter) in seen or parameter.is_meta or not parameter.is_floating_point()
        if not known and not all_finite(parameter):
            raise InputError(
                f"{name}: holds NaN or Inf; the model is broken: get its weights anew, or load "
                "them in bf16 or fp32"
            )
