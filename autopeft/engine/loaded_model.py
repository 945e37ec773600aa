"""The base model that a worker has loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autopeft.engine.messages import WorkerContext
from autopeft.errors import TrainingFailure
from autopeft.models.attention import use_attention
from autopeft.models.backbone import Backbone, load_backbone
from autopeft.models.loading import base_dtype
from autopeft.plan import Candidate
from autopeft.profiling.output_positions import narrow_modules
from autopeft.settings import AUTO
from autopeft.tasks.registry import named_task
from autopeft.training.activation_cache import DEVICE_SHARE, MEMORY_SHARE, ActivationCache
from autopeft.training.compilation import BlockCompiler
from autopeft.training.evaluation import with_base_model
from autopeft.training.last_block import LastBlock
from autopeft.training.measuring import open_meters
from autopeft.training.packing import Packing
from autopeft.training.precision import Precision, choose_precision
from autopeft.training.second_scores import SecondScore
from autopeft.training.setup import TrainingSetup
from autopeft.utils.device import is_accelerator
from autopeft.utils.versions import mismatch, versions


class LoadedModel:
    """The base model, loaded once, with what all jobs on it share.

    Attributes:
        context: What the worker was told.
        backbone: The model.
        setup: How it is trained, without the activation cache.
        test_precision: Precision in which the test split is scored, as users run the adapter: fp32,
            unless the frozen weights are bf16 themselves.
        meters: Counters of costs that rise in each training, by name; see `Cost.meter`.
        second: Score what is trained on other rows too: on text to retain, and on further tasks.
    """

    def __init__(self, context: WorkerContext) -> None:
        self.context = context
        self._mismatch = mismatch(context.versions, versions())
        settings, data, device = context.settings, context.data, context.device
        assert data is not None, "a search without data has another executor"
        task = named_task(settings).bound(data)
        if task.needs_text():
            task.processor = task.load_processor(settings.model, settings.model_revision)
        asked = task.auto_precision if settings.precision == "auto" else settings.precision
        dtype = base_dtype(device, asked)
        self.backbone: Backbone = load_backbone(
            settings.model,
            auto_class=task.auto_class,
            model_kwargs=task.model_kwargs(),
            revision=settings.model_revision,
            device=device,
            dtype=dtype,
            role_map=settings.role_map,
            quantization=settings.quantization,
            replaces_head=data.replaces_head,
            n_devices=settings.devices_per_worker,
            reserved_bytes=context.prices.outside_bytes if context.prices is not None else 0.0,
        )
        model, layout = self.backbone.model, self.backbone.layout
        use_attention(settings.attn_implementation, model)
        head_params = layout.topology.head_params
        if context.head_params not in (None, head_params):
            raise TrainingFailure(
                f"the new head of {settings.model} has {head_params} parameters, but "
                f"{context.head_params} were priced; please report it"
            )
        # Settled by the driver, unless only the workers have the device.
        is_bf16 = dtype == "bfloat16"
        precision = "bf16" if is_bf16 else choose_precision(asked, device, model.config)
        self.test_precision: Precision = "bf16" if is_bf16 else "fp32"
        # The trainings' precision; but the test split is scored as users run the adapter.
        ways = {name: self.test_precision if name == "test" else precision for name in data.splits}
        data = with_base_model(model, task, data, device, ways)
        self.setup = TrainingSetup(
            task,
            data,
            device,
            precision,
            micro_batch_tokens=settings.micro_batch_tokens,
            optimizer=settings.optimizer,
        )
        if settings.packing:
            packing = Packing(task, data, device=device, precision=precision)
            self.setup = replace(self.setup, packing=packing)
        n_devices = settings.devices_per_worker
        self.meters = open_meters(context.measured, device, n_devices)
        self.second = tuple(
            SecondScore.of(each, model, device, self.test_precision) for each in data.second
        )
        self._cache: ActivationCache | None = None
        if settings.activation_cache:
            self._cache = ActivationCache(
                model,
                layout.blocks,
                data,
                device=device,
                precision=precision,
                max_bytes=int(settings.activation_cache_gb * 2**30),
                folder=Path(context.cache_folder) if context.cache_folder else None,
                device_share=DEVICE_SHARE * min(1.0, settings.gpus_per_worker or 1.0),
                memory_share=MEMORY_SHARE / (settings.workers or 1),
                identity=f"{settings.model} {settings.model_revision} {settings.quantization}",
            )
        self._compiler: BlockCompiler | None = None
        if settings.torch_compile:
            self._compiler = BlockCompiler(
                must_pay=settings.torch_compile == AUTO,
                # Workers have a core each.
                options=None if is_accelerator(device) else {"compile_threads": 1},
            )
        if context.window is not None:
            modules = narrow_modules(model, layout)
            last_block = LastBlock(
                model, layout.blocks[-1], modules, task, context.window, precision=precision
            )
            self.setup = replace(self.setup, last_block=last_block)

    def leave_room_for(self, candidates: Sequence[Candidate]) -> None:
        """Keep no more states of the cache on the device than training these leaves room for."""
        if self._cache is not None and is_accelerator(self.context.device):
            self._cache.limit_on_device(self.context.left_beside(candidates))

    @property
    def problem(self) -> str:
        """What the user should know of this worker and its accelerations; "" if nothing."""
        parts = (part.problem for part in (self._cache, self._compiler) if part is not None)
        return "; ".join(filter(None, (self._mismatch, *parts)))

    def setup_above(self, lowest_layer: int | None) -> TrainingSetup:
        """Return the setup with the cache below the lowest adapted block, None if there is none."""
        setup, blocks = self.setup, self.backbone.layout.blocks
        if lowest_layer is not None:
            # The last block keeps little where it is narrowed, and cannot be run twice there. The
            # positions are others in each step, which no graph allows for.
            end = len(blocks) - (self.context.window is not None)
            above = tuple(dict.fromkeys(blocks[lowest_layer:end]))
            if self.context.settings.gradient_checkpointing is True:
                setup = replace(setup, recomputed=above)
            setup = replace(setup, compiler=self._compiler, compiled=above)
        if self._cache is None:
            return setup
        return replace(
            setup,
            cache=self._cache.below(lowest_layer),
            fp32_cache=self._cache.below(lowest_layer, "fp32"),
        )
