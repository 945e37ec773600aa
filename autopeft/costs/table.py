"""The price table: plain numbers, measured once per model, from which any candidate is priced.

A training step costs the frozen forward pass (always the same), the backward pass down to the
lowest adapter, and what the adapters add.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from autopeft import methods
from autopeft.costs.analytic import block_costs, block_shapes, linear_weights
from autopeft.costs.memory import FP32_MOMENTS, Moments
from autopeft.costs.plan_rules import check_plan, count_shared
from autopeft.costs.price import Price
from autopeft.costs.topology import Topology
from autopeft.costs.usage import (
    ENCODER,
    HIDDEN,
    NARROW_ROLES,
    NO_USAGE,
    BlockCosts,
    Logits,
    Sources,
    Usage,
)
from autopeft.errors import SpaceError
from autopeft.plan import MODEL, AdapterPlan, Candidate, LayerSpec

PARAM_BYTES, GRADIENT_BYTES = 4, 4
"""A trained parameter, and its gradient. Gradients come when what the forward pass kept goes."""


class _Total(NamedTuple):
    """What plans add to the frozen forward pass in one step, of the table's batch for each of them.

    Attributes:
        n_plans: How many they are.
        block_bytes: The most that the passes of a live block hold at once, beyond what is kept.
        moment_bytes: What the optimizer keeps.
    """

    n_plans: int = 1
    params: int = 0
    moment_bytes: float = 0.0
    frozen_floats: int = 0
    held_floats: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    saved_bytes: float = 0.0
    block_bytes: float = 0.0


class _SiteCost(NamedTuple):
    """What one adapter adds, in one step of the table's batch.

    Attributes:
        token_flops: The FLOPs, forward and backward, that are proportional to the tokens.
    """

    params: int
    frozen_floats: int
    held_floats: int
    forward_flops: float
    backward_flops: float
    token_flops: float
    saved_bytes: float
    scratch_bytes: float
    input_name: str
    input_bytes: float


def _batched_roles(specs: Iterable[LayerSpec]) -> dict[str, list[LayerSpec]]:
    """Return the roles of a block where all adapters are LoRAs, which are one batched product."""
    found: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        found.setdefault(spec.role, []).append(spec)
    return {
        role: own
        for role, own in found.items()
        if all(methods.get(spec.method).holds_lora_factors for spec in own)
    }


@dataclass(frozen=True)
class PriceTable:
    """Prices any candidate for one model, batch size and row length.

    Attributes:
        topology: The model's shapes.
        batch_size: Rows per step that everything was measured for; others scale linearly.
        tokens: Tokens in a step of mean length, padding included; for FLOPs.
        memory_tokens: Tokens in a step of the longest rows; for memory.
        base_params: Parameters of the whole model.
        weight_bytes: Bytes of its weights and buffers.
        forward_flops: FLOPs of the frozen model's forward pass in one step.
        blocks: The kinds of block.
        kinds: Layer -> index into `blocks`; blocks of one kind have equal shapes.
        tail: What follows the blocks, if the last block's output needs a gradient.
        head_only: The same if it does not and only a new head is trained.
        bridge: What lies between encoder and decoder.
        front: What lies between the input embeddings and the first block, if they need a gradient.
        longer: Virtual tokens of a prompt -> the table of the same model with that prompt in every
            row; prompts of other sizes cannot be priced.
        workspace_bytes: The most that what follows the blocks holds at once, beyond what it keeps.
        scoring_bytes: The most that what follows the blocks holds at once without gradients.
        scoring_tokens: Tokens of a scoring's largest batch; 0: scoring is not priced.
        logits: The output embedding, if there is one.
        float_bytes: Bytes of one activation.
        has_checkpointing: Whether the blocks at and above a plan's lowest adapter keep only their
            inputs, and are computed again in the backward pass.
        pass_tokens: Tokens of a training's forward pass at most; a step of more accumulates the
            gradients of several. None: any number.
        moments: What the optimizer keeps.
        has_activation_cache: Whether the frozen blocks below a plan's lowest adapter are computed
            once for all trials, so that no step pays for them.
        read_share: Share of a step's tokens whose last hidden state is read; a training step
            computes the last block's `NARROW_ROLES` for these only. Rows with a prompt and
            inference compute all tokens. Memory is priced as if all were computed.
        logit_weights: Weights of the output embedding if a training step computes logits at
            `logit_tokens` only; else 0.
        logit_tokens: Positions of a step whose logits are computed.

    Example:
        >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
        >>> space = autopeft.SearchSpace.from_source({"methods": ["lora", "ia3"]}, topology)
        >>> table = autopeft.PriceTable.from_topology(topology, batch_size=8)
        >>> table.price(space.reference()).trainable_params
        0
    """

    topology: Topology
    batch_size: int
    tokens: float
    memory_tokens: float
    base_params: int
    weight_bytes: int
    forward_flops: float
    blocks: tuple[BlockCosts, ...]
    kinds: tuple[int, ...]
    tail: Usage = NO_USAGE
    head_only: Usage = NO_USAGE
    bridge: Usage = NO_USAGE
    front: Usage = NO_USAGE
    longer: Mapping[int, PriceTable] = field(default_factory=dict)
    workspace_bytes: float = 0.0
    scoring_bytes: float = 0.0
    scoring_tokens: float = 0.0
    logits: Logits | None = None
    float_bytes: int = 4
    has_checkpointing: bool = False
    pass_tokens: int | None = None
    moments: Moments = FP32_MOMENTS
    has_activation_cache: bool = False
    read_share: float = 1.0
    logit_weights: int = 0
    logit_tokens: float = 0.0
    _costs: dict[tuple[int, Sources, bool], tuple[Usage, dict[tuple[str, str, int], _SiteCost]]] = (
        field(default_factory=dict, init=False, repr=False, compare=False)
    )

    @classmethod
    def from_topology(
        cls,
        topology: Topology,
        *,
        tokens_per_step: float = 512,
        batch_size: int = 16,
        longest_tokens_per_step: float | None = None,
        base_params: int | None = None,
        float_bytes: int = 4,
        prompt_sizes: Sequence[int] = (),
    ) -> PriceTable:
        """Return a table computed from shapes alone, for a transformer of the usual build.

        Args:
            topology: The model's shapes.
            tokens_per_step: Tokens in a mean step, padding included.
            batch_size: Rows in a step.
            longest_tokens_per_step: Tokens in the step that needs most memory; default: the mean's.
            base_params: Parameters of the whole model; default: those of the linear modules.
            float_bytes: Bytes of a weight and of an activation.
            prompt_sizes: Virtual tokens of the prompts to price.
        """
        longest = longest_tokens_per_step or tokens_per_step
        blocks, kinds = block_costs(
            topology,
            tokens=tokens_per_step,
            memory_tokens=longest,
            rows=batch_size,
            float_bytes=float_bytes,
        )
        n_linear = sum(
            linear_weights(block_shapes(topology, layer)) for layer in range(topology.n_layers)
        )
        head_flops = 2.0 * topology.head_params * batch_size
        n_params = base_params if base_params is not None else n_linear + topology.head_params
        return cls(
            topology=topology,
            batch_size=batch_size,
            tokens=tokens_per_step,
            memory_tokens=longest,
            base_params=n_params,
            weight_bytes=n_params * float_bytes,
            forward_flops=sum(blocks[kind].forward_flops for kind in kinds) + head_flops,
            blocks=blocks,
            kinds=kinds,
            tail=Usage(backward_flops=2.0 * head_flops),
            head_only=Usage(backward_flops=head_flops),
            longer={
                size: cls.from_topology(
                    topology,
                    tokens_per_step=tokens_per_step + size * batch_size,
                    batch_size=batch_size,
                    longest_tokens_per_step=longest + size * batch_size,
                    base_params=base_params,
                    float_bytes=float_bytes,
                )
                for size in prompt_sizes
            },
            float_bytes=float_bytes,
        )

    def as_trained(
        self,
        *,
        has_activation_cache: bool,
        read_share: float = 1.0,
        logit_weights: int = 0,
        logit_tokens: float = 0.0,
        most_logit_tokens: float = 0.0,
        scoring_tokens: float = 0.0,
        has_checkpointing: bool = False,
        pass_tokens: int | None = None,
        moments: Moments = FP32_MOMENTS,
    ) -> PriceTable:
        """Return the table for a training loop that skips unneeded work; see the attributes.

        `most_logit_tokens` are the positions with logits of the step that has most of them.
        """

        def own(table: PriceTable) -> PriceTable:
            table = replace(
                table,
                logit_weights=logit_weights,
                logit_tokens=logit_tokens,
                scoring_tokens=scoring_tokens,
                has_checkpointing=has_checkpointing,
                pass_tokens=pass_tokens,
                moments=moments,
            )
            return table._with_logits_at(most_logit_tokens) if most_logit_tokens else table

        return replace(
            own(self),
            has_activation_cache=has_activation_cache,
            read_share=read_share,
            longer={size: own(table) for size, table in self.longer.items()},
        )

    def with_checkpointing(self) -> PriceTable:
        """Return the table for trainings that compute blocks again in the backward pass."""
        longer = {size: each.with_checkpointing() for size, each in self.longer.items()}
        return replace(self, has_checkpointing=True, longer=longer)

    @property
    def vocabulary(self) -> int:
        """Logits of a position, 0 without an output embedding."""
        return self.logits.vocabulary if self.logits is not None else 0

    @property
    def outside_bytes(self) -> float:
        """Bytes that what follows the blocks holds at once, with its weights left out."""
        training = self.tail.saved_bytes + self.workspace_bytes
        scoring = self.scoring_bytes * self.scoring_tokens / self.memory_tokens
        return max(training * self._pass_share(1.0), scoring)

    def _with_logits_at(self, n: float) -> PriceTable:
        """Return the table for a step that computes logits at `n` positions only."""
        if self.logits is None:
            return self
        computed = n * self.logits.vocabulary
        kept, scratch = computed * Logits.KEPT_BYTES, computed * Logits.SCRATCH_BYTES
        return replace(
            self,
            tail=replace(self.tail, saved_bytes=self.logits.saved_bytes + kept),
            workspace_bytes=scratch,
            scoring_bytes=kept + scratch,
        )

    def _for(self, plan: AdapterPlan) -> PriceTable:
        """Return the table for rows with a plan's prompt, if it has one."""
        for spec in plan.specs:
            if spec.layer:
                break
            if spec.role == MODEL:
                check_plan(self.topology, AdapterPlan([spec]))
                if spec.rank not in self.longer:
                    known = ", ".join(map(str, sorted(self.longer))) or "none"
                    raise SpaceError(
                        "rank",
                        spec.rank,
                        f"prompts of that size were not priced (priced: {known})",
                        "use one of these, or name the size in prompt_sizes",
                    )
                return self.longer[spec.rank]
        return self

    def price(self, candidate: Candidate) -> Price:
        """Return what a candidate costs.

        Raises:
            SpaceError: if the plan does not fit the model.
        """
        train = candidate.train
        table = self._for(candidate.plan)
        total = table._total([candidate.plan], train.dropout > 0.0)
        params = total.params + self.topology.head_params
        scale = train.batch_size / self.batch_size
        step_flops = table.forward_flops + total.forward_flops + total.backward_flops
        step_flops -= table._cached_flops(candidate.plan)
        step_flops -= table._unread_flops(candidate.plan, train.dropout > 0.0)
        # Forward, and backward to the hidden states.
        step_flops -= 4.0 * table.logit_weights * max(0.0, table.tokens - table.logit_tokens)
        memory = table._peak_bytes(total, params, scale)
        return Price(
            trainable_params=params,
            adapter_bytes=(params + total.frozen_floats) * 4,
            train_flops=step_flops * scale * train.steps if params else 0.0,
            peak_memory_bytes=round(memory),
            inference_flops=(table.forward_flops - self.forward_flops + total.forward_flops)
            * scale,
        )

    def pack_bytes(self, candidates: Sequence[Candidate]) -> int:
        """Return the peak memory of candidates that are trained in one forward pass, in bytes.

        They share the frozen weights. Each has rows, an adapter, an optimizer's state and logits of
        its own, and gradients go down to the lowest adapter of all. They have one batch size and
        neither dropout nor prompts (`autopeft.models.multi_adapter.can_share_batch`).

        Raises:
            SpaceError: if a plan does not fit the model.

        Example:
            >>> topology = autopeft.Topology(2, {"attn.q": (64, 64), "attn.v": (64, 64)})
            >>> table = autopeft.PriceTable.from_topology(topology)
            >>> plan = autopeft.AdapterPlan([autopeft.LayerSpec(0, "attn.q", "lora", 8)])
            >>> one = autopeft.Candidate(plan, autopeft.TrainSettings(learning_rate=1e-3))
            >>> table.pack_bytes([one]) == table.price(one).peak_memory_bytes
            True
            >>> table.pack_bytes([one, one]) < 2 * table.pack_bytes([one])
            True
        """
        if len(candidates) == 1:
            return self.price(candidates[0]).peak_memory_bytes
        total = self._total([candidate.plan for candidate in candidates], has_dropout=False)
        params = total.params + self.topology.head_params * len(candidates)
        scale = candidates[0].train.batch_size / self.batch_size
        return round(self._peak_bytes(total, params, scale))

    def _peak_bytes(self, total: _Total, params: int, scale: float) -> float:
        held = self.weight_bytes + params * PARAM_BYTES + total.held_floats * 4
        of_heads = total.n_plans * self._moment_bytes(self.topology.head_params)
        moments = total.moment_bytes + of_heads
        return held + moments + self._activation_bytes(total, params, scale)

    def _moment_bytes(self, n_params: int) -> float:
        """Return what the optimizer keeps for the parameters of a site, taken for two tensors.

        So most methods divide them; the moments of small tensors are few.
        """
        moments = self.moments
        is_small = n_params < 2 * moments.least_values
        return n_params * (FP32_MOMENTS if is_small else moments).value_bytes

    def _activation_bytes(self, total: _Total, params: int, scale: float) -> float:
        """Return the most that training and scoring hold at once beside weights and adapters."""
        blocks = (block.hidden_bytes + block.scoring_bytes for block in self.blocks)
        held = max(self.scoring_bytes, *blocks) * self.scoring_tokens / self.memory_tokens
        if params:
            n = total.n_plans
            at_loss = total.saved_bytes + n * self.workspace_bytes
            in_blocks = total.saved_bytes - n * self.tail.saved_bytes + total.block_bytes
            share = self._pass_share(scale)
            gradients = params * GRADIENT_BYTES
            earlier = gradients if share < 1.0 else 0
            scale *= share
            held = max(held, earlier + max(at_loss, in_blocks) * scale, gradients)
        return held

    def _pass_share(self, scale: float) -> float:
        """Return the share of a step's rows in one forward pass; one row is not split."""
        if self.pass_tokens is None:
            return 1.0
        tokens = self.memory_tokens * scale
        return min(1.0, max(self.pass_tokens, self.memory_tokens / self.batch_size) / tokens)

    def _cached_flops(self, plan: AdapterPlan) -> float:
        """Return the FLOPs per step that the activation cache saves."""
        is_chain = not self.topology.n_encoder_layers and all(b.repeats == 1 for b in self.blocks)
        if not (self.has_activation_cache and is_chain):
            return 0.0
        cut = self.topology.n_layers if plan.lowest_layer is None else plan.lowest_layer
        return sum(self.blocks[kind].forward_flops for kind in self.kinds[:cut])

    def _unread_flops(self, plan: AdapterPlan, has_dropout: bool) -> float:
        """Return the FLOPs per step that are skipped in the last block."""
        last = self.topology.n_layers - 1
        if self.read_share >= 1.0 or (not plan.specs and self.has_activation_cache):
            return 0.0
        kind = self.kinds[last]
        specs = [spec for spec in plan.specs if spec.layer == last]
        sources = {spec.role for spec in specs}
        if len(specs) < len(plan.specs):
            sources.add(HIDDEN)
        usage, _ = self._known(kind, frozenset(sources), has_dropout)
        flops = 0.0
        for role in NARROW_ROLES:
            shape = self.topology.shape(last, role)
            if shape is not None:
                product = (
                    2.0 * shape[0] * shape[1] * self.blocks[kind].tokens.get(role, self.tokens)
                )
                flops += product * (1 + (role in usage.live_inputs))
        for spec in specs:
            if spec.role in NARROW_ROLES:
                flops += self._site_cost(spec, usage, has_dropout).token_flops
        return flops * (1.0 - self.read_share)

    def saved_bytes(self, candidate: Candidate) -> float:
        """Return the bytes that a forward pass of the longest rows keeps for the backward pass."""
        table = self._for(candidate.plan)
        total = table._total([candidate.plan], candidate.train.dropout > 0.0)
        return total.saved_bytes * candidate.train.batch_size / self.batch_size

    def _total(self, plans: Sequence[AdapterPlan], has_dropout: bool) -> _Total:
        n = len(plans)
        if not any(plan.specs for plan in plans):
            usage = self.head_only
            return _Total(
                n, backward_flops=n * usage.backward_flops, saved_bytes=n * usage.saved_bytes
            )
        by_layer: dict[int, list[LayerSpec]] = {}
        for spec in (spec for plan in plans for spec in plan.specs):
            by_layer.setdefault(spec.layer, []).append(spec)
        n_encoder = self.topology.n_encoder_layers
        shared = [count_shared(self.topology, plan) for plan in plans]
        params, frozen, held = sum(shared), 0, 0
        moment_bytes = sum(map(self._moment_bytes, shared))
        # What is frozen, for the rows of one plan; what adapters add, for those of all.
        forward, backward, saved, most = 0.0, 0.0, 0.0, 0.0
        added_backward, added_saved = 0.0, 0.0
        context: dict[int, float] = {}
        is_live = is_encoder_live = False
        shared_inputs: set[str] = set()
        for layer in range(min(by_layer), self.topology.n_layers):
            if layer == n_encoder and is_live:
                # No gradient yet in the decoder's hidden states; the encoder's output has one.
                backward += self.bridge.backward_flops
                saved += self.bridge.saved_bytes
                is_live, is_encoder_live = False, True
            specs = by_layer.pop(layer, ())
            sources = {spec.role for spec in specs}
            if MODEL in sources:
                sources.remove(MODEL)
                backward += self.front.backward_flops
                saved += self.front.saved_bytes
                is_live = True
            if is_encoder_live:
                sources.add(ENCODER)
            kind = self.kinds[layer]
            for repeat in range(self.blocks[kind].repeats):
                if is_live:
                    sources.add(HIDDEN)
                if not sources:
                    continue
                is_live = True
                if not sources <= self.blocks[kind].reach.keys():
                    for plan in plans:
                        check_plan(self.topology, plan)
                block = self.blocks[kind]
                usage, costs = self._known(kind, frozenset(sources), has_dropout)
                backward += usage.backward_flops
                kept, added = usage.saved_bytes, 0.0
                context |= usage.context
                inputs, scratch = set(shared_inputs), 0.0
                batched = _batched_roles(specs) if n > 1 else {}
                for role, own in batched.items():
                    added += self._stacked_bytes(role, own, n, usage)
                if self.has_checkpointing:
                    backward += block.forward_flops
                for spec in specs:
                    cost = self._cost_at(spec, usage, costs, has_dropout)
                    if not repeat:
                        params += cost.params
                        moment_bytes += self._moment_bytes(cost.params)
                        frozen += cost.frozen_floats
                        held += cost.held_floats
                    forward += cost.forward_flops
                    added_backward += cost.backward_flops
                    if self.has_checkpointing:
                        added_backward += cost.forward_flops
                    added += cost.saved_bytes
                    scratch = max(scratch, cost.scratch_bytes)
                    if len(batched.get(spec.role, ())) not in (0, n):
                        continue  # It keeps a copy of its own rows.
                    if cost.input_name and cost.input_name not in inputs:
                        inputs.add(cost.input_name)
                        kept += cost.input_bytes
                        if cost.input_name == ENCODER:
                            shared_inputs.add(ENCODER)
                if self.has_checkpointing:
                    saved += block.hidden_bytes
                    most = max(most, n * (block.scratch_bytes + kept) + scratch + added)
                else:
                    saved += kept
                    added_saved += added
                    most = max(most, n * block.scratch_bytes + scratch)
        for plan in plans if by_layer else ():
            check_plan(self.topology, plan)
        return _Total(
            n,
            params,
            moment_bytes,
            frozen,
            held,
            forward,
            n * (backward + self.tail.backward_flops) + added_backward,
            n * (saved + sum(context.values()) + self.tail.saved_bytes) + added_saved,
            most,
        )

    def _stacked_bytes(self, role: str, specs: Sequence[LayerSpec], n: int, usage: Usage) -> float:
        """Return what a batched product of LoRAs keeps beside what each keeps alone.

        Their factors are stacked, padded to the highest rank, and their rows are copied where some
        of the n plans have no adapter.
        """
        shape = self.topology.shape(specs[0].layer, role)
        assert shape is not None, "checked before"
        out, in_ = shape[:2]
        block = self.blocks[self.kinds[specs[0].layer]]
        tokens = block.memory_tokens.get(role, self.memory_tokens)
        rank = max(spec.rank for spec in specs)
        floats = len(specs) * rank * float(out + in_ * (role in usage.live_inputs))
        floats += sum(rank - spec.rank for spec in specs) * tokens
        if len(specs) < n and self.float_bytes == 4:  # Under autocast each has a copy anyway.
            floats += len(specs) * in_ * tokens
        return floats * self.float_bytes

    def _cost_at(
        self,
        spec: LayerSpec,
        usage: Usage,
        costs: dict[tuple[str, str, int], _SiteCost],
        has_dropout: bool,
    ) -> _SiteCost:
        """Return the cost of an adapter, from those computed so far if it is there."""
        key = (spec.role, spec.method, spec.rank)
        cost = costs.get(key)
        if cost is None:
            check_plan(self.topology, AdapterPlan([spec]))
            cost = costs[key] = self._site_cost(spec, usage, has_dropout)
        return cost

    def _known(
        self, kind: int, sources: Sources, has_dropout: bool
    ) -> tuple[Usage, dict[tuple[str, str, int], _SiteCost]]:
        """Return the usage of a kind of block and its site costs computed so far."""
        key = kind, sources, has_dropout
        if key not in self._costs:
            self._costs[key] = (self.blocks[kind].usage(sources), {})
        return self._costs[key]

    def _site_cost(self, spec: LayerSpec, usage: Usage, has_dropout: bool) -> _SiteCost:
        block = self.blocks[self.kinds[spec.layer]]
        method = methods.get(spec.method)
        shape = self.topology.shape(spec.layer, spec.role)
        assert shape is not None, "checked before"
        out, in_ = shape[:2]
        tokens = block.tokens.get(spec.role, self.tokens)
        memory_tokens = block.memory_tokens.get(spec.role, self.memory_tokens)
        flops = method.flops(spec.rank, shape, spec.role)
        memory = method.memory(spec.rank, shape, spec.role)
        forward = flops.forward_per_token * tokens
        backward = flops.backward_per_token * tokens
        is_live = spec.role in usage.live_inputs
        if has_dropout:
            forward += flops.dropout_forward_per_token * tokens
        if is_live:
            backward += flops.input_grad_per_token * tokens
            if has_dropout:
                backward += flops.dropout_input_grad_per_token * tokens
        elif spec.role in method.input_side_roles:
            # The gradient must come down through the frozen module to reach the adapter.
            backward += 2.0 * out * in_ * tokens
        floats = memory.per_token * memory_tokens + memory.per_step
        if is_live:
            floats += memory.input_grad_per_step
        if self.float_bytes < 4:
            floats += memory.bf16_per_token * memory_tokens + memory.bf16_per_step
            floats += memory.bf16_input_grad_per_step * is_live
        if has_dropout:
            floats += memory.dropout_per_token * memory_tokens
        keeps_input = memory.keeps_input
        if has_dropout and memory.drops_input:
            floats += (keeps_input + is_live) * in_ * memory_tokens
            keeps_input = False
        float_bytes = 4 if method.keeps_fp32 else self.float_bytes
        if keeps_input and self.float_bytes < 4:
            # peft gives its fp32 weights an input of their type, and autocast rounds that again.
            floats += in_ * memory_tokens
            keeps_input = False
        return _SiteCost(
            params=method.n_params(spec.rank, shape, spec.role),
            frozen_floats=method.frozen_floats(spec.rank, shape, spec.role),
            held_floats=method.held_floats(spec.rank, shape, spec.role),
            forward_flops=forward + flops.forward_per_step,
            backward_flops=backward + flops.backward_per_step,
            token_flops=forward + backward,
            saved_bytes=floats * float_bytes,
            scratch_bytes=(memory.scratch_per_step + memory.scratch_per_token * memory_tokens)
            * float_bytes,
            input_name=block.input_of.get(spec.role, spec.role) if keeps_input else "",
            input_bytes=usage.input_bytes.get(spec.role, 0.0),
        )
