"""Layers and parts of peft that compute the same without letting the host wait for the device.

In a training step, peft moves what never changes to the device again, or reads values from there.
No upstream issues are known.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.vblora.layer import Linear as VbLoraLinear
from peft.tuners.waveft import waverec2d
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.layer import WaveFTLinear
from torch import nn


class WaveFtLayer(WaveFTLinear):  # type: ignore[misc]
    """WaveFT's layer. peft selects indices by a mask, and makes the filters at each use."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return the update of the weight, shape (out, in)."""
        spectrum, (rows, columns) = self.waveft_spectrum[adapter], self.waveft_indices[adapter]
        reductions = WAVELET_REDUCTIONS[self.waveft_wavelet_family[adapter]]
        height = _even(self.out_features + reductions[0])
        width = _even(self.in_features + reductions[1])
        top, left = (height - self.out_features) // 2, (width - self.in_features) // 2
        places = (rows + top) * width + columns + left
        dense = spectrum.new_zeros(height * width).index_put((places,), spectrum)
        # The four quarters of the matrix are the bands, in the order of the filters.
        quarters = dense.view(2, height // 2, 2, width // 2).transpose(1, 2)
        bands = quarters.reshape(1, 4, height // 2, width // 2)
        filters = self.waveft_filters[adapter]  # (4, 1, taps, taps)
        found: torch.Tensor = nn.functional.conv_transpose2d(bands, filters, stride=2)[0, 0]
        top, left = (
            (found.shape[0] - self.out_features) // 2,
            (found.shape[1] - self.in_features) // 2,
        )
        found = found[top : top + self.out_features, left : left + self.in_features]
        return found * float(self.waveft_scaling[adapter])

    @classmethod
    def take_over(cls, layer: WaveFTLinear) -> None:
        """Make a layer of peft's one of this class. The device gets its constants with the rest."""
        layer.__class__ = cls
        layer.waveft_filters = {
            adapter: waverec2d._construct_2d_filt(lo=lo, hi=hi)
            for adapter, family in layer.waveft_wavelet_family.items()
            for *_, lo, hi in [
                waverec2d._get_filter_tensors(
                    family, flip=False, device=torch.device("cpu"), dtype=torch.float32
                )
            ]
        }


class VbLoraLayer(VbLoraLinear):  # type: ignore[misc]
    """VB-LoRA's layer. peft looks for infinite logits in each step, as some files have them."""

    training: bool

    def _get_lora_matrices(self, adapter: str, cast_to_fp32: bool = False) -> Any:
        before = self.training
        self.training = False
        try:
            return super()._get_lora_matrices(adapter, cast_to_fp32)
        finally:
            self.training = before


class Allocator(RankAllocator):  # type: ignore[misc]
    """AdaLoRA's allocator. peft reads the threshold and the masks, and sends these back."""

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, torch.Tensor]:
        """Drop the least important triplets; return name -> which are kept, shape (rank, 1)."""
        values = {
            name: parameter
            for name, parameter in model.named_parameters()
            if f"lora_E.{self.adapter_name}" in name
        }
        scores = {}
        for name in values:
            a, b = (name.replace("lora_E", part) for part in ("lora_A", "lora_B"))
            vectors = self._element_score(a).mean(dim=1) + self._element_score(b).mean(dim=0)
            scores[name] = self._element_score(name) + vectors[:, None]  # (rank, 1)
        device = next(iter(scores.values())).device  # A model may be spread over several.
        every = torch.cat([score.flatten().to(device) for score in scores.values()])
        threshold = torch.kthvalue(every, k=self.init_bgt - budget).values
        kept = {name: score > threshold.to(score.device) for name, score in scores.items()}
        self.mask_using_rank_pattern(model, kept)
        return kept

    @torch.no_grad()
    def mask_using_rank_pattern(
        self, model: nn.Module, rank_pattern: dict[str, torch.Tensor]
    ) -> None:
        """Set what is not kept to 0."""
        for name, parameter in model.named_parameters():
            if name in rank_pattern:
                parameter.masked_fill_(~rank_pattern[name], 0.0)


def _even(size: int) -> int:
    return size + size % 2
