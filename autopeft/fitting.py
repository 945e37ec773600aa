"""What of a model fits in a device's memory, asked before there is a search."""

from __future__ import annotations

from autopeft.errors import SettingsError
from autopeft.models.backbone import Backbone, build_from_config
from autopeft.models.layout import check_role_map
from autopeft.models.loading import base_dtype, load_config, position_limit
from autopeft.preparing.notes import Note
from autopeft.preparing.paths import expand
from autopeft.preparing.pricing import load_of, meta_of
from autopeft.preparing.task_data import load_task
from autopeft.profiling.fits import RANK, Fitting, Load
from autopeft.profiling.output_positions import n_logits
from autopeft.settings import SearchSettings
from autopeft.utils.device import DEFAULT

_LENGTH = 1024
"""Tokens of a row without data, if the model has positions for so many."""


def fitting(asked: SearchSettings, *, note: Note) -> Fitting:
    """Return what prices a LoRA in any size, from data or, without any, from a configuration alone.

    Args:
        asked: Settings of model, data, batch, length and precision.
        note: Called with a line about what is priced.

    Raises:
        UserError: for a mistake in the settings.
    """
    settings = expand(asked, needs_data=False)
    if settings.data:
        data, task = load_task(settings)
        meta = meta_of(settings, data, task)
        load = load_of(settings, data, task)
        rows = f"rows of {load.length} tokens, the longest in the data"
    else:
        meta = build_from_config(
            settings.model, revision=settings.model_revision, role_map=settings.role_map
        )
        check_role_map(meta.model, meta.layout, settings.role_map)
        load = _load_without_data(settings, meta)
        rows = f"rows of {load.length} tokens (max_length)"
    dtype = base_dtype(DEFAULT, settings.precision)
    note(
        f"{meta.auto_class}, frozen weights in {dtype}, LoRA of rank {RANK} at every linear "
        f"module; {load.batch_size} {rows} a step"
    )
    return Fitting(meta, load, device=DEFAULT, dtype=dtype)


def _load_without_data(settings: SearchSettings, meta: Backbone) -> Load:
    config, _ = load_config(settings.model, model_kwargs=None, revision=settings.model_revision)
    limit = position_limit(config)
    length = settings.max_length or min(_LENGTH, limit or _LENGTH)
    if limit is not None and length > limit:
        problem = f"the model has positions for {limit} tokens"
        raise SettingsError("max_length", length, problem, f"use at most {limit}")
    return Load(
        settings.rows_per_step, length, longest=limit, target_share=1.0 if n_logits(meta) else 0.0
    )
