"""Plan -> modules attached: peft's layers, put where the plan says, and taken out again.

peft is made to inject into a small holder that has only one group's modules as children, never into
the model itself. That keeps one injection from freezing or deactivating what another has put in,
needs no walk over the whole model, and makes detaching a matter of putting the original modules
back, which are never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft import methods
from autopeft.costs import check_plan, count_trainable
from autopeft.methods import HEAD, Method
from autopeft.models import tuners as tuners  # Makes peft know autopeft's own methods.
from autopeft.models.method_hooks import ADAPTER_NAME, TrainingHook, hooks_for
from autopeft.models.quantization import pass_marks
from autopeft.plan import AdapterPlan, Candidate, TrainSettings
from autopeft.utils.quiet import quiet_peft

if TYPE_CHECKING:
    from autopeft.models.backbone import Backbone
    from autopeft.models.topology import Layout


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        method: A method's name, or "head".
        learning_rate: Peak rate.
        parameters: All of that method's trainable parameters, in the plan's order.
    """

    method: str
    learning_rate: float
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Group:
    """Modules that one peft configuration covers.

    Attributes:
        method: Their method.
        ranks: Module path -> rank.
        input_side: Those whose input is changed instead of their output.
        transposed: True if their weights are stored as (in, out), as GPT-2's Conv1D does.
        pool: What they have in common, where the method's sites cannot all share state.
    """

    method: Method
    ranks: Mapping[str, int]
    input_side: tuple[str, ...] = ()
    transposed: bool = False
    pool: int = 0

    def config(self, train: TrainSettings, rename: Mapping[str, str] | None = None) -> PeftConfig:
        """The configuration that peft takes.

        Args:
            train: Gives dropout and alpha.
            rename: Module path -> name in the holder. Without, the configuration is one for the
                model itself, as peft's own files hold it.
        """
        names = rename or {path: path for path in self.ranks}
        ranks = {names[path]: rank for path, rank in self.ranks.items()}
        arguments = self.method.peft_config_for(ranks, train) | self.method.pool_config(self.pool)
        kind = arguments.pop("peft_type")
        if self.method.input_side_argument:
            arguments[self.method.input_side_argument] = [names[path] for path in self.input_side]
        build = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        if self.transposed and self.method.transposed_base and rename is None:
            # What never looks into the weight has no such argument.
            if hasattr(build, "fan_in_fan_out"):
                arguments["fan_in_fan_out"] = True
        with quiet_peft():
            return build(target_modules=list(ranks), **arguments)


def groups_of(plan: AdapterPlan, layout: Layout) -> tuple[Group, ...]:
    """The plan as peft sees it: one group for each configuration, in a fixed order."""
    ranks: dict[tuple[str, int, bool, int], dict[str, int]] = {}
    input_side: dict[tuple[str, int, bool, int], list[str]] = {}
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
    return tuple(
        Group(methods.get(key[0]), ranks[key], tuple(input_side.get(key, ())), *key[2:])
        for key in sorted(ranks)
    )


@dataclass(frozen=True)
class Part:
    """One injected group.

    Attributes:
        group: What was asked for.
        tuner: peft's tuner around the holder.
        holder_names: Module path -> its name in the holder.
        layers: Module path -> the layer now in its place.
        hook: What acts while the group is trained, where its method needs that.
    """

    group: Group
    tuner: Any
    holder_names: Mapping[str, str]
    layers: Mapping[str, nn.Module] = field(repr=False)
    hook: TrainingHook | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters; those that sites share come once."""
        own: dict[int, nn.Parameter] = {}
        for layer in self.layers.values():
            # An adapted attention or model holds modules that other groups adapt, and the head.
            if isinstance(layer, tuners.OwnLayer):
                found = layer.own_parameters()
            else:
                found = layer.parameters()
            own |= {id(p): p for p in found if p.requires_grad}
        yield from own.values()


class Attached:
    """A candidate in place. Use it as a context manager, or call `detach` when done.

    Attributes:
        model: The base model with the adapters in it, in evaluation mode.
        candidate: What is attached.
        backbone: Where it is attached.
        seed: What its initial values came from.
        parts: The injected groups.
    """

    def __init__(self, backbone: Backbone, candidate: Candidate, *, seed: int) -> None:
        if backbone.attached is not None:
            raise RuntimeError("a candidate is attached already; detach it first")
        check_plan(backbone.topology, candidate.plan)
        self.backbone = backbone
        self.model = backbone.model
        self.candidate = candidate
        self.seed = seed
        self.parts: tuple[Part, ...] = ()
        self._originals: dict[str, nn.Module] = {}
        self._placed: dict[str, nn.Module] = {}
        self._was_training = backbone.model.training
        backbone.attached = self
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._start_head()
                self.parts = tuple(
                    self._inject(group) for group in groups_of(candidate.plan, backbone.layout)
                )
            self._check_count()
        except BaseException:
            self.detach()
            raise

    def original(self, path: str) -> nn.Module:
        """The base model's own module at the path of an adapted one."""
        return self._originals[path]

    @property
    def placed(self) -> Mapping[str, nn.Module]:
        """Module path -> what stands there instead of the base model's own module."""
        return self._placed

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the new head, [] where the model has none."""
        return [
            parameter
            for path in self.backbone.head
            for parameter in self._placed[path].parameters(recurse=False)
        ]

    def _place(self, path: str, module: nn.Module) -> None:
        replace_module(self.model, path, module)
        self._placed[path] = module

    def _start_head(self) -> None:
        self._originals |= {path: self.model.get_submodule(path) for path in self.backbone.head}
        for path in self.backbone.head:
            module = copy.deepcopy(self._originals[path])
            self._place(path, module)
            module.__dict__.pop("_is_hf_initialized", None)
            for parameter in module.parameters(recurse=False):
                # transformers refuses to initialize again what carries this mark.
                parameter.__dict__.pop("_is_hf_initialized", None)
                parameter.requires_grad_(True)
            self.model._init_weights(module)  # type: ignore[operator]

    def _inject(self, group: Group) -> Part:
        holder = nn.Module()
        paths = list(group.ranks)
        if group.method.shared_state:
            # As peft would come across them in the model: what a site gets depends on it.
            paths.sort(key=self.backbone.module_order.__getitem__)
        names = {path: f"m{i}" for i, path in enumerate(paths)}
        for path, name in names.items():
            original = self.model.get_submodule(path)
            self._originals[path] = original
            # What rewrites the weight gets one of its own.
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
        # Inside an adapted attention or model, peft takes charge of what is not its own as well.
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
                layer.register_forward_hook(_as_a_linear_layer)
        hooks.after_injection(layers, self.backbone.svds)
        return Part(group, tuner, names, layers, hooks.training_hook(tuner))

    def _check_count(self) -> None:
        live = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        priced = count_trainable(self.backbone.topology, self.candidate.plan)
        if live != priced:
            raise RuntimeError(
                f"the attached model trains {live} parameters, but {priced} were priced"
            )

    def parameter_groups(self) -> tuple[ParameterGroup, ...]:
        """All trainable parameters, by method, the head last."""
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
        """What its methods add to a training loss; None: nothing."""
        terms = [part.hook.penalty() for part in self.parts if part.hook]
        return torch.stack(terms).sum() if terms else None

    def after_update(self, step: int) -> None:
        """Lets its methods act after an optimizer step, while the gradients are still there.

        Args:
            step: Steps done, from 1 to `candidate.train.steps`.
        """
        for part in self.parts:
            if part.hook:
                part.hook.after_update(step)

    def park(self) -> None:
        """Takes everything out of the model, and keeps it as it is for `unpark`."""
        if self.backbone.attached is not self:
            return
        for path, original in self._originals.items():
            replace_module(self.model, path, original)
        self.model.train(self._was_training)
        self.backbone.attached = None

    def unpark(self) -> None:
        """Puts back what `park` took out.

        Raises:
            RuntimeError: if another candidate is attached.
        """
        if self.backbone.attached is not None:
            raise RuntimeError("a candidate is attached already; detach it first")
        self.backbone.attached = self
        for path, module in self._placed.items():
            replace_module(self.model, path, module)

    def detach(self) -> None:
        """Gives the base model back as it was, bit for bit; harmless if done already."""
        self.park()
        self.parts = ()
        self._originals = {}
        self._placed = {}

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def _as_a_linear_layer(_layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Under autocast, gives what the bare layer would: several methods end in fp32.

    Models rely on it (DeBERTa fills its scores with the least number of its queries' type), and
    what follows would be computed in fp32 as well.
    """
    device = output.device.type
    if output.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return output.to(torch.get_autocast_dtype(device))
    return output


class LinearView(nn.Linear):
    """A Conv1D seen as the linear layer that it is: same storage, same arithmetic to the last bit.

    peft's methods know Conv1D partly (LoRA, at the price of copying the weight for DoRA) or not at
    all (OFT, MiSS); a linear layer they all know.

    Args:
        conv: Its weight has shape (in, out).
    """

    def __init__(self, conv: Conv1D) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = conv.weight.shape
        self.look_at(conv)

    def look_at(self, conv: nn.Module) -> None:
        """Takes its weight and bias from a Conv1D."""
        weight, bias = conv.weight, conv.bias
        assert isinstance(weight, nn.Parameter)
        assert isinstance(bias, nn.Parameter)
        self.weight = nn.Parameter(weight.detach().t(), requires_grad=False)
        self.bias = bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        flat = torch.addmm(self.bias, input.view(-1, self.in_features), self.weight.t())
        return flat.view(*input.shape[:-1], self.out_features)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place that a path names."""
    parent_path, _, name = path.rpartition(".")
    parent: Any = model.get_submodule(parent_path)
    while name not in parent._modules:
        # An adapted attention shows the modules of the one that it wraps.
        parent = parent.base_layer
    parent._modules[name] = module
