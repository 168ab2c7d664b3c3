"""Feed-forward experts: routed tokens in, weighted sums of the experts' outputs back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.contraction.layer_plan import LayerPlan, Work, layer_plan
from tnmoe.contraction.pieces import rows_per_piece
from tnmoe.errors import (
    InputError,
    check_bool,
    check_int_from_zero,
    check_number_in,
    check_positive_int,
)
from tnmoe.nn.activations import is_repeatable, resolve_activation
from tnmoe.nn.compute.once_per_token import FirstCall, LastCall, Load, Tensors
from tnmoe.nn.compute.pieces import apply_in_pieces
from tnmoe.nn.compute.products import Products
from tnmoe.nn.compute.slot_network import SlotNetwork, sum_at_once, sum_in_chunks, sum_unsorted
from tnmoe.nn.compute.slots import (
    DenseDispatch,
    Groups,
    SlotOrder,
    sum_choices,
    zero_unrouted,
)
from tnmoe.nn.mpo_projection import project_pair
from tnmoe.nn.projection import Projection
from tnmoe.nn.transforms import (
    autocast_dtype,
    has_values,
    is_transformed,
    needs_native_operators,
    values_are_readable,
)

# Slots of a call that are multiplied by their experts' cores without being sorted: always up to the
# first number, and up to the second where the cores of all slots together have few numbers.
_FEWEST_SLOTS = 16
_FEW_SLOTS = 128
_FEW_NUMBERS = 1 << 19

# Numbers that the last-level cache of a CPU holds, roughly.
_LAST_LEVEL_CACHE = 1 << 22


class Experts(nn.Module):
    """E feed-forward networks ``down(act(up(x)))``, or ``down(act(gate(x)) · up(x))`` if gated.

    Parameters
    ----------
    up, down : Projection
        (E, F, H) and (E, H, F).
    gate : Projection, optional
        (E, F, H); makes the experts gated.
    activation : str or callable
        Name of an activation, or an elementwise function or module; with a gate also the name of
        a gated unit or a :class:`Gated`.
    dropout : float
        Probability, in training, of dropping an activated intermediate value (as in T5).

    Raises
    ------
    InputError
        If the projections do not fit each other, the activation is unknown, or the dropout is
        not in [0, 1].

    Examples
    --------
    >>> up, down = StackedProjection(4, 16, 8), StackedProjection(4, 8, 16)
    >>> experts = Experts(up, down, activation="gelu")
    >>> index = torch.tensor([[0], [3], [3]])  # one expert for each of three tokens
    >>> experts(torch.randn(3, 8), index, torch.ones(3, 1)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        up: Projection,
        down: Projection,
        gate: Projection | None = None,
        *,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = (up.num_experts, up.in_features, up.out_features)
        for name, projection, fits in (
            ("down", down, (down.num_experts, down.out_features, down.in_features)),
            ("gate", gate, gate and (gate.num_experts, gate.in_features, gate.out_features)),
        ):
            if projection is not None and fits != sizes:
                raise InputError(f"{name} ({projection}) does not fit up ({up})")
        self.num_experts, self.hidden_size, self.intermediate_size = sizes
        self.up, self.gate, self.down = up, gate, down
        self.activation = resolve_activation(activation, gated=gate is not None)
        self.dropout = check_number_in("dropout", dropout, "[0, 1]")

    @classmethod
    def _from_projections(
        cls,
        projections: Mapping[str, Projection],
        biases: Mapping[str, Tensor | None],
        *,
        common_bias: bool,
        activation: str | Callable[..., Tensor],
        dropout: float,
    ) -> Self:
        """Make an instance from projections, bypassing the constructor of a subclass."""
        common = check_bool("common_bias", common_bias)
        for name, projection in projections.items():
            projection.set_bias(biases[name], common, f"{name}_bias")
        experts = cls.__new__(cls)
        Experts.__init__(
            experts,
            projections["up"],
            projections["down"],
            projections.get("gate"),
            activation=activation,
            dropout=dropout,
        )
        return experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token through its experts and sum their outputs.

        The signature is that of Hugging Face's experts modules.

        Parameters
        ----------
        hidden_states : Tensor, shape (T, H)
        top_k_index : Tensor of int64, shape (T, k)
            Experts of every token. Index E marks a choice without an expert: its output is zero,
            whatever its weight.
        top_k_weights : Tensor, shape (T, k)
            Weights of the experts' outputs in the sum.

        Returns
        -------
        Tensor, shape (T, H)
            In the dtype of ``hidden_states``.

        Raises
        ------
        InputError
            If the shapes do not fit, the states are not floating-point numbers, or an index is
            not in 0, …, E. On an accelerator, indices are not checked: it would synchronise.
        """
        self._check_shapes(hidden_states, top_k_index, top_k_weights)
        if is_transformed():
            return self._run_densely(hidden_states, top_k_index, top_k_weights)
        states = hidden_states.to(autocast_dtype(hidden_states) or hidden_states.dtype)
        if not values_are_readable(states):
            outputs = self._run_without_sync(states, top_k_index, top_k_weights)
            return outputs.to(hidden_states.dtype)
        products = self._products(self._load(states, top_k_index.numel()))
        if self._are_few(products, top_k_index) and self._all_routed(top_k_index):
            network = self._slot_network(products, states)
            sums = sum_unsorted(network, top_k_index, top_k_weights)
            return self._output(products, sums, states).to(hidden_states.dtype)
        groups = Groups.of(top_k_index.reshape(-1), self.num_experts)
        routed, weights = self._count_routed(groups), top_k_weights
        if routed < groups.layer_slots:
            unrouted = top_k_index == self.num_experts
            weights = weights.masked_fill(unrouted, 0)
            states = zero_unrouted(states, unrouted.all(1))
        if self._is_faster_expert_by_expert(products, groups):
            outputs = self._run_expert_by_expert(states, groups, weights)
        else:
            outputs = self._run(products, states, groups, weights, routed)
        return outputs.to(hidden_states.dtype)

    def _check_shapes(self, states: Tensor, index: Tensor, weights: Tensor) -> None:
        if not states.is_floating_point():
            raise InputError(f"hidden_states must be floating-point, got {states.dtype}")
        fits = (
            states.ndim == index.ndim == 2
            and states.shape[1] == self.hidden_size
            and index.shape[0] == states.shape[0]
            and index.shape == weights.shape
        )
        if not fits:
            raise InputError(
                f"expected hidden_states (T, {self.hidden_size}), top_k_index and top_k_weights "
                f"(T, k), got hidden_states {tuple(states.shape)}, top_k_index "
                f"{tuple(index.shape)}, top_k_weights {tuple(weights.shape)}"
            )
        if index.is_floating_point():
            raise InputError(f"top_k_index must hold integers, got {index.dtype}")

    def _count_routed(self, groups: Groups) -> int:
        """Count the slots that have an expert; they come first."""
        if not groups.layer_slots:
            return 0
        lowest, highest = groups.experts[0].item(), groups.experts[-1].item()
        if lowest < 0 or highest > self.num_experts:
            raise InputError(
                f"top_k_index must hold experts from 0 to {self.num_experts - 1}, or "
                f"{self.num_experts} for none, got {lowest} to {highest}"
            )
        return groups.layer_slots if highest < self.num_experts else int(groups.offsets[-1])

    def _run(
        self,
        products: Products,
        states: Tensor,
        groups: Groups,
        weights: Tensor,
        routed: int,
        unrouted: Tensor | None = None,
    ) -> Tensor:
        """Compute the layer's output (T, H), each projection for all experts at once.

        Rows after the first ``routed`` have no expert, nor have those where ``unrouted`` is true.
        """
        network = self._slot_network(products, states)
        if routed and self._fits_chunks(products, groups):
            width = max(self.intermediate_size, *(part.shape[1] for part in network.inputs))
            sums = sum_in_chunks(network, groups, weights, width)
        else:
            step = rows_per_piece(self.intermediate_size, self.hidden_size)
            in_pieces = not torch.is_grad_enabled() and values_are_readable(states)
            limit = step if in_pieces else None
            sums = sum_at_once(network, groups, weights, routed, unrouted, limit)
        return self._output(products, sums, states)

    def _output(self, products: Products, sums: Sequence[Tensor], states: Tensor) -> Tensor:
        return products.last.of_tokens([total.to(states.dtype) for total in sums])

    def _are_few(self, products: Products, index: Tensor) -> bool:
        """Return whether slots are so few that sorting them costs more than it saves."""
        slots = index.numel()
        if torch.is_grad_enabled() or products.have_calls or not 0 < slots <= _FEW_SLOTS:
            return False
        sizes = [weight[0].numel() for weight in products.weights if weight.ndim == 5]
        return slots <= _FEWEST_SLOTS or slots * max([0, *sizes]) <= _FEW_NUMBERS

    def _all_routed(self, index: Tensor) -> bool:
        lowest, highest = torch.aminmax(index)
        return bool(lowest >= 0) and bool(highest < self.num_experts)

    def plan(self, tokens: int, top_k: int = 1, training: bool = False) -> LayerPlan:
        """Plan a call; ``print`` the plan to see what it computes per token and per slot.

        Parameters
        ----------
        tokens : int
            Tokens T of the call.
        top_k : int
            Experts per token, E at most.
        training : bool
            Whether a backward pass follows. The plan is that of the forward pass.

        Returns
        -------
        LayerPlan

        Raises
        ------
        InputError
            If a number is not an integer in its range.
        """
        tokens = check_int_from_zero("tokens", tokens)
        top_k = check_positive_int("top_k", top_k)
        if top_k > self.num_experts:
            raise InputError(f"top_k={top_k} exceeds the number of experts, {self.num_experts}")
        load = Load(tokens, tokens * top_k, check_bool("training", training), is_known=True)
        return layer_plan(tokens, top_k, self.num_experts, self._products(load).work())

    def _load(self, states: Tensor, slots: int) -> Load:
        is_known = not torch.compiler.is_compiling() and has_values(states)
        training = torch.is_grad_enabled() and (
            states.requires_grad or any(each.requires_grad for each in self.parameters())
        )
        return Load(len(states), slots, training, is_known)

    def _products(self, load: Load) -> Products:
        """Return the products of a call: of gate and up, or of up alone, and of down."""
        inner = [self.up] if self.gate is None else [self.gate, self.up]
        # Parts of a product bypass the call of a projection, and with it what wraps the projection.
        firsts = [
            (isinstance(each, Projection) and each.first_product(load))
            or FirstCall(each, partial(_work_of_call, each, load))
            for each in inner
        ]
        down = self.down
        last = isinstance(down, Projection) and down.last_product(load)
        return Products(firsts, last or LastCall(down, partial(_work_of_call, down, load)))

    def _slot_network(self, products: Products, states: Tensor) -> SlotNetwork:
        """Return the network between what acts once per token, for the tokens of a call."""
        inputs, positions = products.states_of(states)

        def function(rows: Tensors, weights: Tensors, groups: SlotOrder) -> Tensors:
            *of_firsts, of_last = products.split(weights)
            if self.gate is not None and products.are_calls:
                sides: Tensors = project_pair(self.gate, self.up, rows[0], groups)  # type: ignore[arg-type]
            else:
                sides = tuple(
                    first.of_slots([rows[number] for number in numbers], own, groups)
                    for first, numbers, own in zip(
                        products.firsts, positions, of_firsts, strict=True
                    )
                )
            inner = self._drop(self.activation(*sides))
            return products.last.of_slots(inner, of_last, groups)

        return SlotNetwork(inputs, products.weights, function, self.num_experts)

    def _fits_chunks(self, products: Products, groups: Groups) -> bool:
        """Return whether slots should go through in chunks that stay in a CPU's caches."""
        if groups.layer_slots * self.intermediate_size <= _LAST_LEVEL_CACHE:
            return False
        # A chunk is computed again in the backward pass, from the weights of the products alone.
        return not (
            products.have_calls
            or groups.offsets.device.type != "cpu"
            or torch.compiler.is_compiling()
            or needs_native_operators()
            or not has_values(groups.offsets)
            or (torch.is_grad_enabled() and not self._is_repeatable)
        )

    @property
    def _is_repeatable(self) -> bool:
        """Whether the network between the products gives the same again, and trains nothing."""
        sides = 1 if self.gate is None else 2
        return not (self.dropout and self.training) and is_repeatable(
            self.activation, sides, self.intermediate_size
        )

    def _run_without_sync(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Do what :meth:`_run` does where the number of routed slots cannot be read.

        An expert that has tokens anyway takes the slots without an expert, as rows of zeros. Its
        outputs for them are dropped.
        """
        unrouted = index >= self.num_experts
        states = zero_unrouted(states, unrouted.all(1))
        weights = weights.masked_fill(unrouted, 0)
        products = self._products(self._load(states, index.numel()))
        if self._are_few(products, index):
            network = self._slot_network(products, states)
            known = index.masked_fill(unrouted, 0)
            sums = sum_unsorted(network, known, weights, unrouted.reshape(-1))
            return self._output(products, sums, states)
        used = F.pad(index.masked_fill(unrouted, 0).reshape(-1), (0, 1)).amax()
        groups = Groups.of(torch.where(unrouted, used, index).reshape(-1), self.num_experts)
        unrouted = unrouted.reshape(-1).index_select(0, groups.order)
        return self._run(products, states, groups, weights, groups.layer_slots, unrouted)

    def _run_expert_by_expert(self, states: Tensor, groups: Groups, weights: Tensor) -> Tensor:
        """Compute the layer's output (T, H), one expert after the other.

        The rows between two projections are then still in a cache when the second one starts.
        """
        (tokens, choices), flat = weights.shape, weights.reshape(-1, 1)
        dtype = torch.result_type(states, weights)
        outputs = states.new_zeros(tokens * choices, self.hidden_size, dtype=dtype)
        for block, group in groups.by_expert():
            slots = groups.order[block]
            part = self._feed_forward(states.index_select(0, slots // choices), group)
            outputs.index_copy_(0, slots, part * flat.index_select(0, slots))
        return sum_choices(outputs.view(tokens, choices, self.hidden_size))

    def _is_faster_expert_by_expert(self, products: Products, groups: Groups) -> bool:
        """Return whether the rows of all experts at once would spill from the caches.

        In training the answer is no, because the backward pass needs all rows anyway.
        """
        if torch.is_grad_enabled() or needs_native_operators() or not products.are_calls:
            return False
        if groups.layer_slots * self.intermediate_size <= _LAST_LEVEL_CACHE:
            return False
        return not (
            self.up.uses_joint_route(groups.layer_slots)
            or self.down.uses_joint_route(groups.layer_slots)
        )

    def _feed_forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """Apply the experts to their rows, in pieces to bound the memory."""

        def network(rows: Tensor, _: list[Tensor], groups: Groups) -> Sequence[Tensor]:
            return (self._network(rows, groups),)

        step = rows_per_piece(self.intermediate_size, self.hidden_size)
        return apply_in_pieces(network, rows, (), groups, step)[0]

    def _network(self, rows: Tensor, groups: Groups) -> Tensor:
        if self.gate is None:
            inner = self.activation(self.up(rows, groups))
        else:
            inner = self.activation(*project_pair(self.gate, self.up, rows, groups))
        return self.down(self._drop(inner), groups)

    def _drop(self, inner: Tensor) -> Tensor:
        return F.dropout(inner, self.dropout, self.training) if self.dropout else inner

    def _run_densely(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Apply every expert to every token, or to zeros where the token did not choose it.

        Under ``torch.func``, code may not depend on how many slots an expert has. So this costs E
        times as much.
        """
        table = DenseDispatch.of(index, weights, self.num_experts)
        rows = table.dispatch(states)
        projections = (self.up,) if self.gate is None else (self.gate, self.up)
        inner = self.activation(*(table.mask(project(rows, table)) for project in projections))
        outputs = self.down(table.mask(self._drop(inner)), table)
        return table.combine(outputs).to(states.dtype)


def _work_of_call(projection: Projection, load: Load) -> Work:
    """Count what a call of a projection, or of a wrapper of one, costs."""
    return projection.work_of_call(load)
