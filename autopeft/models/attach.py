"""Attach a candidate to its base model, and detach it again.

peft injects into a small holder module whose children are the modules of one group, never into the
model itself. So one injection cannot freeze or deactivate what another one has put in, no walk over
the whole model is needed, and detaching means putting the original modules back, which are never
changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft import methods
from autopeft.costs import check_plan, count_trainable
from autopeft.methods import EXPERT_ROLES, HEAD, Method
from autopeft.models import tuners as tuners  # Registers autopeft's own methods with peft.
from autopeft.models.backbone import Backbone
from autopeft.models.layout import Layout
from autopeft.models.method_hooks import ADAPTER_NAME, TrainingHook, hooks_for
from autopeft.models.modules import LinearView, own_parameters, replace_module
from autopeft.models.quantization import pass_marks
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.utils.device import drawn_on_host, is_accelerator
from autopeft.utils.quiet import quiet_peft


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        method: A method's name, or "head".
        learning_rate: Peak rate.
        parameters: All trainable parameters of that method, in the plan's order.
    """

    method: str
    learning_rate: float
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Group:
    """Modules that one peft configuration covers.

    Attributes:
        method: Their method.
        ranks: Path of a module or parameter -> rank.
        input_side: The modules whose input is changed instead of their output.
        transposed: Whether their weights are stored as (in, out), as in GPT-2's Conv1D.
        pool: See `Method.pool`.
        parameters: The paths that are those of parameters: experts.
    """

    method: Method
    ranks: Mapping[str, int]
    input_side: tuple[str, ...] = ()
    transposed: bool = False
    pool: int = 0
    parameters: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules, and of those that hold the parameters, each once."""
        paths = (p.rpartition(".")[0] if p in self.parameters else p for p in self.ranks)
        return tuple(dict.fromkeys(paths))

    def config(self, train: TrainSettings, rename: Mapping[str, str] | None = None) -> PeftConfig:
        """Return peft's configuration of the group.

        With `rename` (module path -> name in the holder) it is for the holder, without for the
        model itself, as in peft's own files.
        """

        def name_of(path: str) -> str:
            if rename is None or path in rename:
                return path if rename is None else rename[path]
            module, _, parameter = path.rpartition(".")
            return f"{rename[module]}.{parameter}"

        names = {path: name_of(path) for path in self.ranks}
        ranks = {names[path]: rank for path, rank in self.ranks.items()}
        arguments = self.method.peft_config_for(ranks, train) | self.method.pool_config(self.pool)
        kind = arguments.pop("peft_type")
        if self.method.input_side_argument:
            arguments[self.method.input_side_argument] = [names[path] for path in self.input_side]
        build = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        if self.transposed and self.method.transposed_base and rename is None:
            # Configurations of methods that never read the weight lack this argument.
            if hasattr(build, "fan_in_fan_out"):
                arguments["fan_in_fan_out"] = True
        if self.parameters:
            arguments["target_parameters"] = [names[path] for path in self.parameters]
            # peft refuses it beside parameters; the modules get it when they are injected.
            arguments[self.method.dropout_argument] = 0.0
        modules = [names[path] for path in self.ranks if path not in self.parameters]
        with quiet_peft():
            return build(target_modules=modules, **arguments)


def groups_of(plan: AdapterPlan, layout: Layout) -> tuple[Group, ...]:
    """Split a plan into groups, one for each peft configuration, in a fixed order."""
    ranks: dict[tuple[str, int, bool, int], dict[str, int]] = {}
    input_side: dict[tuple[str, int, bool, int], list[str]] = {}
    parameters: dict[tuple[str, int, bool, int], list[str]] = {}
    for spec in plan.specs:
        method = methods.get(spec.method)
        shape = layout.topology.shape(spec.layer, spec.role)
        assert shape is not None, "checked before"
        key = (
            spec.method,
            0 if method.rank_pattern else spec.rank,
            spec.role in layout.topology.transposed_roles,
            method.pool(shape),
        )
        for path in layout.modules[spec.layer, spec.role]:
            ranks.setdefault(key, {})[path] = spec.rank
            if spec.role in method.input_side_roles:
                input_side.setdefault(key, []).append(path)
            if spec.role in EXPERT_ROLES:
                parameters.setdefault(key, []).append(path)
    return tuple(
        Group(
            methods.get(key[0]),
            ranks[key],
            tuple(input_side.get(key, ())),
            *key[2:],
            tuple(parameters.get(key, ())),
        )
        for key in sorted(ranks)
    )


@dataclass(frozen=True)
class Part:
    """One injected group.

    Attributes:
        group: What was injected.
        tuner: peft's tuner around the holder.
        holder_names: Module path -> its name in the holder.
        layers: Module path -> the layer now in its place.
        hook: What acts while the group is trained, if its method needs that.
    """

    group: Group
    tuner: Any
    holder_names: Mapping[str, str]
    layers: Mapping[str, nn.Module] = field(repr=False)
    hook: TrainingHook | None = None

    def adapters(self) -> Iterator[tuple[str, Any]]:
        """Yield each adapted module's or parameter's path and layer.

        Those of several parameters of one module are nested; the inner one comes first.
        """
        for path, layer in self.layers.items():
            nested = wrappers(layer)
            for wrapper in reversed(nested):
                yield f"{path}.{wrapper.parameter_name}", wrapper
            if not nested:
                yield path, layer

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters, each once, even where sites share them."""
        own: dict[int, nn.Parameter] = {}
        for layer in self.layers.values():
            # An adapted attention or model contains modules that other groups adapt, and the head.
            if isinstance(layer, tuners.OwnLayer):
                found = layer.own_parameters()
            else:
                found = layer.parameters()
            own |= {id(p): p for p in found if p.requires_grad}
        yield from own.values()


class Attached:
    """An attached candidate. Use it as a context manager, or call `detach` when done.

    Attributes:
        model: The base model with the adapters in it, in evaluation mode.
        candidate: What is attached.
        backbone: Where it is attached.
        seed: Seed of its initial values.
        parts: The injected groups.
        originals: Path of an adapted module -> the base model's own module.
        placed: The same path -> the module in its place.
    """

    def __init__(self, backbone: Backbone, candidate: Candidate, *, seed: int) -> None:
        if backbone.attached is not None:
            raise RuntimeError("another candidate is attached; detach it first")
        check_plan(backbone.topology, candidate.plan)
        self.backbone = backbone
        self.model = backbone.model
        self.candidate = candidate
        self.seed = seed
        self.parts: tuple[Part, ...] = ()
        self.originals: dict[str, nn.Module] = {}
        self.placed: dict[str, nn.Module] = {}
        self._parameter_order: dict[str, list[str]] = {}
        self._was_training = backbone.model.training
        backbone.attached = self
        try:
            with drawn_on_host(seed):
                self._start_head()
                self.parts = tuple(
                    self._inject(group) for group in groups_of(candidate.plan, backbone.layout)
                )
            self._check_count()
        except BaseException:
            self.detach()
            raise

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the new head, [] if the model has none."""
        return [p for path in self.backbone.head for p in own_parameters(self.placed[path])]

    def _place(self, path: str, module: nn.Module) -> None:
        replace_module(self.model, path, module)
        self.placed[path] = module

    def _start_head(self) -> None:
        self.originals |= {path: self.model.get_submodule(path) for path in self.backbone.head}
        for path in self.backbone.head:
            module = copy.deepcopy(self.originals[path])
            module.float()  # In half precision the small steps would be rounded away.
            self._place(path, module)
            module.__dict__.pop("_is_hf_initialized", None)
            for parameter in own_parameters(module):
                # transformers does not initialize a parameter with this mark again.
                parameter.__dict__.pop("_is_hf_initialized", None)
                parameter.requires_grad_(True)
            self.model._init_weights(module)  # type: ignore[operator]

    def _inject(self, group: Group) -> Part:
        holder = nn.Module()
        paths = list(group.modules)
        if group.method.shared_state:
            # In the order in which peft would meet them in the model: each site's share of the
            # common state depends on it.
            paths.sort(key=self.backbone.module_order.__getitem__)
        names = {path: f"m{i}" for i, path in enumerate(paths)}
        for path, name in names.items():
            original = self.model.get_submodule(path)
            self.originals[path] = original
            if group.parameters:
                self._parameter_order[path] = list(original._parameters)
            module = copy.deepcopy(original) if group.method.changes_base else original
            holder.add_module(name, LinearView(module) if isinstance(module, Conv1D) else module)
        pass_marks(self.model, holder)
        config = group.config(self.candidate.train, rename=names)
        hooks = hooks_for(group.method.name)
        hooks.prepare_config(config)
        before = [(p, p.requires_grad) for p in holder.parameters()]
        with quiet_peft(), hooks.around_injection(holder):
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](
                holder, {ADAPTER_NAME: config}, ADAPTER_NAME
            )
        # Inside an adapted attention or model, peft also freezes the modules of other groups.
        for parameter, was_trained in before:
            parameter.requires_grad_(was_trained)
        # In half precision the small steps of a low rate would be rounded away.
        tuner._cast_adapter_dtype(ADAPTER_NAME, autocast_adapter_dtype=True)
        layers = {path: holder.get_submodule(name) for path, name in names.items()}
        for path, layer in layers.items():
            if not isinstance(layer, BaseTunerLayer):
                raise RuntimeError(f"{group.method.name} was not attached to {path}")
            self._place(path, layer.train(self._was_training))
            if isinstance(layer.get_base_layer(), nn.Linear):
                layer.register_forward_hook(_match_autocast)
            if group.parameters and self.candidate.train.dropout and not wrappers(layer):
                dropout = nn.Dropout(self.candidate.train.dropout).train(self._was_training)
                layer.lora_dropout[ADAPTER_NAME] = dropout
        hooks.after_injection(layers, self.backbone.svds)
        for layer in layers.values():
            _move_constants(layer)
        return Part(group, tuner, names, layers, hooks.training_hook(tuner))

    def _check_count(self) -> None:
        live = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        priced = count_trainable(self.backbone.topology, self.candidate.plan)
        if live != priced:
            raise RuntimeError(
                f"the attached model trains {live} parameters, but {priced} were priced"
            )

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """Return all trainable parameters by method, the head last."""
        by_method: dict[str, list[nn.Parameter]] = {}
        for part in self.parts:
            by_method.setdefault(part.group.method.name, []).extend(part.parameters())
        if self.backbone.head:
            by_method[HEAD] = self.head_parameters()
        train = self.candidate.train
        return tuple(
            ParameterGroup(name, train.rate_for(name), tuple(parameters))
            for name, parameters in by_method.items()
        )

    def penalty(self) -> torch.Tensor | None:
        """Return what the methods add to the training loss; None if nothing."""
        terms = [part.hook.penalty() for part in self.parts if part.hook]
        if not terms:
            return None
        # Where the loss is, if the model is spread over several devices.
        device = next(self.model.parameters()).device
        return torch.stack([term.to(device) for term in terms]).sum()

    def after_update(self, step: int) -> None:
        """Let the methods act after optimizer step `step`, while the gradients still exist."""
        for part in self.parts:
            if part.hook:
                part.hook.after_update(step)

    def park(self) -> None:
        """Take everything out of the model and keep it as it is for `unpark`."""
        if self.backbone.attached is not self:
            return
        for path, original in self.originals.items():
            replace_module(self.model, path, original)
        for path, order in self._parameter_order.items():
            # peft registers an adapted parameter anew at each use, and the order decides how the
            # wrappers of several are nested.
            own = self.originals[path]._parameters
            for name in order:
                own[name] = own.pop(name)
        self.model.train(self._was_training)
        self.backbone.attached = None

    def unpark(self) -> None:
        """Put back what `park` took out.

        Raises:
            RuntimeError: if another candidate is attached.
        """
        if self.backbone.attached is not None:
            raise RuntimeError("another candidate is attached; detach it first")
        self.backbone.attached = self
        for path, module in self.placed.items():
            replace_module(self.model, path, module)

    def detach(self) -> None:
        """Restore the base model bit for bit. Does nothing the second time."""
        self.park()
        self.parts = ()
        self.originals = {}
        self.placed = {}
        self._parameter_order = {}

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(backbone: Backbone, candidate: Candidate, *, seed: int) -> Attached:
    """Attach a candidate's adapters and initialize them and the head.

    Args:
        backbone: The base model; it holds one candidate at a time.
        candidate: What to attach.
        seed: Decides every random initial value; the global generator is not touched.

    Returns:
        The attached candidate, a context manager that detaches at its end.

    Raises:
        SpaceError: if the plan does not fit the model.
        RuntimeError: if another candidate is attached.
    """
    return Attached(backbone, candidate, seed=seed)


def _move_constants(layer: nn.Module) -> None:
    """Move what peft leaves on the host, to copy it at every use, to where the parameters are.

    Those are permutations and indices: buffers, attributes, and values of dicts.
    """
    device = next(layer.parameters()).device
    if not is_accelerator(device):
        return
    for values, name, value in constants(layer):
        if not is_accelerator(value.device):
            values[name] = value.to(device)


def constants(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Yield what an adapter holds beside parameters: where, under which name, and the tensor."""
    base = getattr(layer, "base_layer", None)
    theirs = set() if base is None else set(base.modules())
    for module in layer.modules():
        if module in theirs:
            continue
        for values in (vars(module), *(v for v in vars(module).values() if type(v) is dict)):
            for name, value in tuple(values.items()):
                if type(value) is torch.Tensor:
                    yield values, name, value


def wrappers(layer: Any) -> list[Any]:
    """Return peft's nested wrappers of a module's parameters, the outer one first."""
    found = []
    while isinstance(layer, ParamWrapper):
        found.append(layer)
        layer = layer.base_layer
    return found


def _match_autocast(_layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Cast the output to what the bare layer would return under autocast.

    Several methods end in fp32. Some models rely on the lower precision (DeBERTa fills its scores
    with the lowest number of its queries' type), and all that follows would run in fp32.
    """
    device = output.device.type
    if output.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return output.to(torch.get_autocast_dtype(device))
    return output
