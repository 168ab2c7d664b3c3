"""Feed-forward experts: routed tokens in, weighted sums of the experts' outputs back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.contraction.pieces import rows_per_piece
from tnmoe.errors import InputError, check_bool, check_generator, check_number_in
from tnmoe.nn.activations import is_repeatable, resolve_activation
from tnmoe.nn.compute.once_per_token import FirstCall, LastCall, Load, Products, Tensors
from tnmoe.nn.compute.pieces import apply_in_pieces
from tnmoe.nn.compute.slot_network import SlotNetwork, sum_at_once, sum_in_chunks
from tnmoe.nn.compute.slots import DenseDispatch, Groups, sum_choices, zero_unrouted
from tnmoe.nn.mpo_projection import project_pair
from tnmoe.nn.projection import Bias, Projection, StackedProjection
from tnmoe.nn.settings import projection_sizes
from tnmoe.nn.transforms import (
    autocast_dtype,
    has_values,
    is_transformed,
    needs_native_operators,
    values_are_readable,
)

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
        groups = Groups.of(top_k_index.reshape(-1), self.num_experts)
        routed, weights = self._count_routed(groups), top_k_weights
        if routed < groups.layer_slots:
            unrouted = top_k_index == self.num_experts
            weights = weights.masked_fill(unrouted, 0)
            states = zero_unrouted(states, unrouted.all(1))
        products = self._products(states, groups)
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
            sums = sum_in_chunks(network, groups, weights, self.intermediate_size)
        else:
            step = rows_per_piece(self.intermediate_size, self.hidden_size)
            in_pieces = not torch.is_grad_enabled() and values_are_readable(states)
            limit = step if in_pieces else None
            sums = sum_at_once(network, groups, weights, routed, unrouted, limit)
        return products.last.of_tokens([total.to(states.dtype) for total in sums])

    def _products(self, states: Tensor, groups: Groups) -> Products:
        """Return the products of this call: of gate and up, or of up alone, and of down."""
        is_known = not torch.compiler.is_compiling() and has_values(states)
        training = torch.is_grad_enabled() and (
            states.requires_grad or any(each.requires_grad for each in self.parameters())
        )
        load = Load(len(states), groups.layer_slots, training, is_known)
        inner = [self.up] if self.gate is None else [self.gate, self.up]
        # Parts of a product bypass the call of a projection, and with it what wraps the projection.
        firsts = [
            (isinstance(each, Projection) and each.first_product(load)) or FirstCall(each)
            for each in inner
        ]
        down = self.down
        last = (isinstance(down, Projection) and down.last_product(load)) or LastCall(down)
        return Products(firsts, last)

    def _slot_network(self, products: Products, states: Tensor) -> SlotNetwork:
        """Return the network between what acts once per token, for the tokens of a call."""
        inputs, positions = products.states_of(states)

        def function(rows: Tensors, weights: Tensors, groups: Groups) -> Tensors:
            *of_firsts, of_last = products.split(weights)
            if self.gate is not None and products.are_calls:
                sides: Tensors = project_pair(self.gate, self.up, rows[0], groups)
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
        used = F.pad(index.masked_fill(unrouted, 0).reshape(-1), (0, 1)).amax()
        groups = Groups.of(torch.where(unrouted, used, index).reshape(-1), self.num_experts)
        weights = weights.masked_fill(unrouted, 0)
        states = zero_unrouted(states, unrouted.all(1))
        unrouted = unrouted.reshape(-1).index_select(0, groups.order)
        products = self._products(states, groups)
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


class DenseExperts(Experts):
    """Experts that each own their whole matrices: an ordinary mixture of experts.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        Sizes E, H, F.
    activation, dropout
        As for :class:`Experts`.
    gated : bool
        Whether there is a gate projection.
    bias : bool or "common"
        Whether the projections of every expert have biases of their own, or all experts have them
        in common.
    device, dtype : optional
        Device and dtype of the parameters, as for torch's own layers.

    Examples
    --------
    >>> experts = DenseExperts(num_experts=4, hidden_size=8, intermediate_size=16)
    >>> experts.up.weight().shape, experts.down.weight().shape
    (torch.Size([4, 16, 8]), torch.Size([4, 8, 16]))
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Callable[..., Tensor] = "relu",
        *,
        gated: bool = False,
        bias: Bias = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        projections = {
            name: StackedProjection(num_experts, *size, bias=bias, device=device, dtype=dtype)
            for name, size in projection_sizes(hidden_size, intermediate_size, gated).items()
        }
        super().__init__(**projections, activation=activation, dropout=dropout)

    @classmethod
    def from_dense(
        cls,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None = None,
        *,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        common_bias: bool = False,
        num_experts: int = 8,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
        noise: float = 0.0,
        rng: np.random.Generator | int | None = None,
    ) -> Self:
        """Start all experts as one pretrained FFN (sparse upcycling, arXiv:2212.05055).

        Parameters
        ----------
        up, down, gate, up_bias, down_bias, gate_bias, common_bias, num_experts
            As for :meth:`MPOExperts.from_dense`.
        activation, dropout
            As for :class:`Experts`.
        noise : float
            Noise on every expert's matrices, relative to the root mean square of each matrix.
        rng : numpy Generator or int, optional
            Source of the noise.

        Raises
        ------
        InputError
            If the matrices or biases do not fit each other.
        """
        rng = check_generator(rng)
        projections = {
            name: StackedProjection.from_dense(matrix, num_experts, noise, rng)
            for name, matrix in check_ffn(up, down, gate, gate_bias).items()
        }
        return cls._from_projections(
            projections,
            {"up": up_bias, "down": down_bias, "gate": gate_bias},
            common_bias=common_bias,
            activation=activation,
            dropout=dropout,
        )


def check_ffn(
    up: Tensor, down: Tensor, gate: Tensor | None, gate_bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the matrices of a feed-forward network by name; check that they fit each other.

    Raises
    ------
    InputError
        If a matrix is not a Tensor, shapes do not fit, or a gate's bias comes without a gate.
    """
    matrices = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
    for name, matrix in matrices.items():
        if not isinstance(matrix, Tensor):
            raise InputError(f"{name} must be a Tensor, got a {type(matrix).__name__}")
    if gate is None and gate_bias is not None:
        raise InputError("gate_bias was given without a gate")
    fits = up.ndim == 2 and all(
        matrix.shape == (up.shape[::-1] if name == "down" else up.shape)
        for name, matrix in matrices.items()
    )
    if not fits:
        given = ", ".join(f"{name} {tuple(matrix.shape)}" for name, matrix in matrices.items())
        raise InputError(f"up and gate must be (F, H) and down (H, F), got {given}")
    return matrices
