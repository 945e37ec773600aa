"""A candidate as an ordinary `PeftModel`, for trainers that are not autopeft's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from autopeft.errors import AdapterError
from autopeft.models.attach import Attached
from autopeft.models.saving import fill, save_adapter

_REFERENCE = "ref"
"""What TRL calls its copy of an untrained adapter. Here that is the model without the adapter."""


class AdaptedModel(PeftModel):  # type: ignore[misc]
    """A base model with a candidate's adapters, of one method or of several.

    It has a `PeftModel`'s interface: `save_pretrained` writes the adapter, `disable_adapter` gives
    the base model, `print_trainable_parameters` counts. The plan may also be empty; then there is
    nothing to train.

    Attributes:
        attached: The candidate in its base model.
    """

    def __init__(self, attached: Attached) -> None:
        nn.Module.__init__(self)
        parts = attached.parts
        config = parts[0].group.config(attached.candidate.train) if parts else PeftConfig()
        model: Any = attached.model
        config.base_model_name_or_path = attached.backbone.base_model or model.name_or_path
        self.attached = attached
        self.peft_type = config.peft_type
        self.active_adapter = "default"
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        self.base_model = _Holder(model, config)
        self._forward_before = model.__dict__.get("forward")

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Take the adapters out of the model while the block runs."""
        if self._adapters_disabled:
            yield
            return
        self._park()
        try:
            yield
        finally:
            self._unpark()

    def _park(self) -> None:
        mode = self.attached.model.training
        self.attached.park()
        self.attached.model.train(mode)
        self._adapters_disabled = True

    def _unpark(self) -> None:
        mode = self.attached.model.training
        self.attached.unpark()
        self.attached.model.train(mode)
        self._adapters_disabled = False

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, **_: Any) -> None:
        """Add the reference that trainers of TRL ask for: the model without the adapters.

        An adapter that has not been trained changes nothing, so no copy of it is needed.

        Raises:
            AdapterError: for any other adapter.
        """
        if adapter_name != _REFERENCE:
            raise AdapterError(
                "adapter_name", adapter_name, "a candidate holds one adapter", "attach another one"
            )
        self.peft_config[adapter_name] = peft_config

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter; for one of the reference, a copy that nothing reads."""
        own = target.replace(f".{_REFERENCE}.", ".default.")
        found: nn.Parameter = super().get_parameter(own)
        if own == target:
            return found
        return nn.Parameter(found.detach().clone(), requires_grad=False)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Switch to "default" or to the reference."""
        if adapter_name not in self.peft_config:
            known = ", ".join(self.peft_config)
            raise AdapterError("adapter_name", adapter_name, "no such adapter", f"use {known}")
        if (adapter_name == _REFERENCE) != self._adapters_disabled:
            (self._park if adapter_name == _REFERENCE else self._unpark)()
        self.active_adapter = adapter_name

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the adapter, as `autopeft.load_adapter` and, for one method, peft load it."""
        save_adapter(self.attached, save_directory)

    def load_adapter(self, model_id: str | Path, adapter_name: str = "default", **_: Any) -> None:
        """Fill the adapters with what `save_pretrained` wrote, e.g. the best checkpoint.

        Raises:
            AdapterError: if the folder is damaged or of another plan.
        """
        was_training = self.attached.model.training
        fill(self.attached, Path(model_id))
        self.attached.model.train(was_training)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write nothing: a search writes its own cards."""

    def get_model_status(self) -> Any:
        """Raise an error: peft looks for tuners that here are inside of single modules."""
        raise AdapterError(
            "model", type(self).__name__, "peft cannot tell its status", "see `attached.candidate`"
        )

    def unload(self) -> nn.Module:
        """Take the adapters out for good, and return the base model as it was before."""
        model = self.attached.model
        self.attached.detach()
        # TRL patches the forward of the model it trains.
        model.__dict__.pop("forward", None)
        if self._forward_before is not None:
            model.forward = self._forward_before
        return model


class _Holder(nn.Module):
    """Stands where peft has a tuner: around the base model."""

    def __init__(self, model: nn.Module, config: PeftConfig) -> None:
        super().__init__()
        self.model = model
        self.peft_config = {"default": config}
        self.active_adapters = ["default"]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.model(*args, **kwargs)
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
