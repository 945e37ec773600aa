"""Load what is compared, one after another, each on a base model of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from safetensors import safe_open
from torch import nn

from autopeft.comparing.prompts import check_prompt
from autopeft.comparing.sources import Source, is_same_base
from autopeft.costs import Price, PriceTable
from autopeft.errors import AdapterError
from autopeft.models.adapter_files import HEAD_FILE, TENSOR_FILE, SavedPlan
from autopeft.models.attention import use_attention
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.models.loading import load_config
from autopeft.models.peft_config import read_peft_config
from autopeft.models.peft_plan import plan_of_peft
from autopeft.models.quantization import NONE
from autopeft.models.saving import HEAD_APART, PEFT_ROOT, load_attached, place_peft_folder
from autopeft.plan import Candidate
from autopeft.plan_text import plan_summary
from autopeft.settings import SearchSettings
from autopeft.tasks.base import Task
from autopeft.tasks.data import TaskData
from autopeft.tasks.labels import in_order
from autopeft.utils.formatting import counted

_WIDTHS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""What a merged model and its base model have in common."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be scored.

    Attributes:
        model: With the adapter in it.
        method: What the adapter is, in one line.
        trainable_params: Parameters that were trained; None where the files do not tell.
        candidate: What it is as a plan, so that it can be priced; None: no plan says it.
    """

    model: nn.Module
    method: str
    trainable_params: int | None = None
    candidate: Candidate | None = None


@dataclass(frozen=True)
class Opener:
    """Loads models for one comparison.

    Attributes:
        settings: The model, how it is stored, and what else a comparison has.
        task: Bound to the data.
        data: The encoded data.
        device: Where to load, as torch names it.
        dtype: Type of the weights.
        takes_any_base: Whether an adapter that names another base model is scored too.
    """

    settings: SearchSettings
    task: Task
    data: TaskData
    device: str
    dtype: str
    takes_any_base: bool = False

    def base(self) -> Backbone:
        """Load the base model."""
        settings = self.settings
        return self._ready(
            load_backbone(
                settings.model,
                auto_class=self.task.auto_class,
                model_kwargs=self.task.model_kwargs(),
                revision=settings.model_revision,
                device=self.device,
                dtype=self.dtype,
                role_map=settings.role_map,
                quantization=settings.quantization,
                replaces_head=self.data.replaces_head,
            )
        )

    def open(self, source: Source) -> Opened:
        """Load one source.

        Raises:
            AdapterError: if it does not fit the base model or the data, or is damaged or unsafe.
            ModelError: if a model cannot be loaded.
        """
        opened = {"autopeft": self._own, "peft": self._peft, "model": self._model}
        return opened[source.kind](source)

    def _ready(self, backbone: Backbone) -> Backbone:
        use_attention(self.settings.attn_implementation, backbone.model)
        return backbone

    def _check_base(self, source: Source, named: str | None) -> None:
        """Check the base model that an adapter names."""
        if self.takes_any_base or is_same_base(named, self.settings.model):
            return
        raise AdapterError(
            "adapter",
            str(source.folder),
            f"was trained on {named}, not on {self.settings.model}",
            "give that model as --model, or --any-base if the given one is a copy of it",
        )

    def _own(self, source: Source) -> Opened:
        """Load an adapter that autopeft saved."""
        saved = SavedPlan.read(source.folder)
        self._check_base(source, saved.base_model)
        if saved.auto_class != self.task.auto_class:
            problem = f"was trained as {saved.auto_class}; {self.task.name} needs another"
            remedy = f"name the --task it was trained for: {saved.extra.get('task', 'unknown')}"
            raise AdapterError("adapter", str(source.folder), problem, remedy)
        self._check_labels(source, tuple(map(str, saved.extra.get("labels", self.data.labels))))
        settings = self.settings
        attached = load_attached(
            settings.model,
            source.folder,
            quantization=settings.quantization,
            device=self.device,
            dtype=self.dtype,
        )
        self._ready(attached.backbone)
        candidate = self._as_trained_here(saved.candidate)
        method = plan_summary(candidate.plan)
        if saved.quantization != settings.quantization:
            here = "whole" if settings.quantization == NONE else settings.quantization
            there = "whole" if saved.quantization == NONE else saved.quantization
            method += f"; trained over {there} weights, scored over {here} ones"
        return Opened(attached.model, method, _trained(attached.model), candidate)

    def _peft(self, source: Source) -> Opened:
        """Load a peft folder of others."""
        config = read_peft_config(source.folder)
        if (source.folder / HEAD_FILE).is_file():
            remedy = "name the run that it is of, or export it with --format lora"
            raise AdapterError("adapter", str(source.folder), HEAD_APART, remedy)
        self._check_base(source, config.base_model_name_or_path)
        backbone = self.base()
        if config.is_prompt:
            check_prompt(source, config, backbone.model, self.task.auto_class, self.data)
        model = place_peft_folder(backbone.model, source.folder, is_trainable=True)
        self._check_head(source, backbone)
        found = plan_of_peft(model, backbone.layout)
        kind = str(config.peft_type).lower()
        if found is None:
            return Opened(model, kind, _trained(model))
        plan, train = found
        candidate = self._as_trained_here(Candidate(plan, train))
        return Opened(model, plan_summary(plan), _trained(model), candidate)

    def _model(self, source: Source) -> Opened:
        """Load a whole model, such as a merged one."""
        settings, folder = self.settings, str(source.folder)
        own, _ = load_config(folder, model_kwargs=None, revision=None)
        base, _ = load_config(settings.model, model_kwargs=None, revision=settings.model_revision)
        for name in _WIDTHS:
            here, there = (getattr(c.get_text_config(), name, None) for c in (own, base))
            if here != there:
                problem = f"is no copy of {settings.model}: {name} is {here}, not {there}"
                raise AdapterError("adapter", folder, problem, "compare models of one base model")
        self._check_labels(source, _output_names(own, self.data.labels))
        backbone = load_backbone(
            folder,
            auto_class=self.task.auto_class,
            model_kwargs=self.task.model_kwargs(),
            device=self.device,
            dtype=self.dtype,
            quantization=settings.quantization,
        )
        if backbone.head:
            problem = f"has no weights for {', '.join(backbone.head)} of {self.task.auto_class}"
            remedy = "save the model with its trained head, or name another --task"
            raise AdapterError("adapter", folder, problem, remedy)
        return Opened(self._ready(backbone).model, "whole model")

    def _check_labels(self, source: Source, labels: tuple[str, ...]) -> None:
        if self.data.labels and labels != self.data.labels:
            problem = f"has the outputs {_shown(labels)}, the data {_shown(self.data.labels)}"
            remedy = "name the data it was trained for, or give a --model that names its outputs so"
            raise AdapterError("adapter", str(source.folder), problem, remedy)

    def _check_head(self, source: Source, backbone: Backbone) -> None:
        """Check that a peft folder has the head that the base model lacks."""
        with safe_open(source.folder / TENSOR_FILE, "pt") as file:
            names = set(file.keys())
        # Beside a prompt, which changes no module, peft writes the head by a shorter name.
        lacking = [
            path
            for path in backbone.head
            if not names & {f"{PEFT_ROOT}{path}.weight", f"base_model.{path}.weight"}
        ]
        if lacking:
            raise AdapterError(
                "adapter",
                str(source.folder),
                f"has no {', '.join(lacking)}, which {self.settings.model} lacks too",
                "save it with its head (modules_to_save), or name another --task",
            )

    def _as_trained_here(self, candidate: Candidate) -> Candidate:
        """Return what is priced: one step of as many rows as the settings say."""
        rows = self.settings.rows_per_step
        return replace(candidate, train=replace(candidate.train, steps=1, batch_size=rows))

    def priced(self, opened: Opened, prices: PriceTable) -> Price | None:
        """Return the price of what was opened; None where no plan says what it is.

        A plan that does not have as many parameters as were loaded is not it.
        """
        if opened.candidate is None:
            return None
        price = prices.price(opened.candidate)
        return price if price.trainable_params == opened.trainable_params else None


def base_summary(backbone: Backbone) -> str:
    """Return what the base model alone is, in one line."""
    return "the base model, with a new head" if backbone.head else "the base model"


def _output_names(config: Any, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a model calls its outputs, if it names them as the data does."""
    names, is_known = in_order(labels, config)
    return names if is_known else labels


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _shown(labels: tuple[str, ...]) -> str:
    more = f" and {counted(len(labels) - 5, 'more')}" if len(labels) > 5 else ""
    return ", ".join(labels[:5]) + more
