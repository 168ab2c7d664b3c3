"""Feed-forward experts: routed tokens in, weighted sums of the experts' outputs back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self
from weakref import WeakKeyDictionary

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
from tnmoe.nn.compute.choices import Choices
from tnmoe.nn.compute.once_per_token import FirstCall, LastCall, Load, Tensors
from tnmoe.nn.compute.products import Products
from tnmoe.nn.compute.slot_network import SlotNetwork
from tnmoe.nn.compute.slot_sums import sum_slots
from tnmoe.nn.compute.slots import DenseDispatch, SlotOrder
from tnmoe.nn.mpo_projection import project_pair
from tnmoe.nn.projection import Projection
from tnmoe.nn.settings import check_projections
from tnmoe.nn.snapshot import Snapshot
from tnmoe.nn.transforms import (
    autocast_dtype,
    cast,
    has_values,
    is_transformed,
    values_are_readable,
)
from tnmoe.options import PROJECTIONS, ProjectionName

# The products of each layer's last call, with its load and what its projections held.
_last_products: WeakKeyDictionary[Experts, tuple[Load, Snapshot, Products]] = WeakKeyDictionary()


class Experts(nn.Module):
    """E feed-forward networks ``down(act(up(x)))``, or ``down(act(gate(x)) · up(x))`` if gated.

    Parameters
    ----------
    up, down : Projection
        (E, F, H) and (E, H, F).
    gate : Projection, optional
        (E, F, H); makes the experts gated.
    gate_up : Projection, optional
        (E, 2F, H), instead of ``gate`` and ``up``: the rows of every expert's gate and below them
        those of its up, as in ``gate_up_proj`` of transformers.
    activation : str or callable
        Name of an activation, or an elementwise function or module; with a gate also the name of
        a gated unit or a :class:`Gated`.
    dropout : float
        Probability, in training, of dropping an activated intermediate value (as in T5).

    Raises
    ------
    InputError
        If the projections are not ``up`` and ``down``, perhaps with ``gate``, or ``gate_up`` and
        ``down``, or do not fit each other; if the activation is unknown, or the dropout is not in
        [0, 1].

    Examples
    --------
    >>> from tnmoe.nn import StackedProjection
    >>> up, down = StackedProjection(4, 16, 8), StackedProjection(4, 8, 16)
    >>> experts = Experts(up, down, activation="gelu")
    >>> index = torch.tensor([[0], [3], [3]])  # one expert for each of three tokens
    >>> experts(torch.randn(3, 8), index, torch.ones(3, 1)).shape
    torch.Size([3, 8])
    """

    # Computes a call where experts are spread over ranks (shard_experts).
    exchange: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(
        self,
        up: Projection | None = None,
        down: Projection | None = None,
        gate: Projection | None = None,
        *,
        gate_up: Projection | None = None,
        activation: str | Callable[..., Tensor] = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        given = {"gate_up": gate_up, "gate": gate, "up": up, "down": down}
        projections = {name: each for name, each in given.items() if each is not None}
        check_projections(projections)
        _check_sizes(projections)
        self.up, self.gate, self.gate_up, self.down = up, gate, gate_up, projections["down"]
        self.num_experts = self.down.num_experts
        self.hidden_size, self.intermediate_size = self.down.out_features, self.down.in_features
        self.activation = resolve_activation(activation, gated=self.is_gated)
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
        for name, bias in biases.items():
            if bias is None:
                continue
            if name not in projections:
                raise InputError(f"{name}_bias is given without {name}")
            projections[name].set_bias(bias, common, f"{name}_bias")
        experts = cls.__new__(cls)
        Experts.__init__(experts, **projections, activation=activation, dropout=dropout)
        return experts

    @property
    def is_gated(self) -> bool:
        """Whether the activation takes gates besides ups."""
        return self.gate is not None or self.gate_up is not None

    def _keep_experts(self, experts: Sequence[int]) -> None:
        """Take over the number of experts, after the projections have new rows.

        Parameters
        ----------
        experts : sequence of int
            Which old expert every new one was.
        """
        self.num_experts = len(experts)
        for projection in self.projections().values():
            projection._keep_experts(experts)
        # Their parts may hold views of the old rows.
        _last_products.pop(self, None)

    def projections(self) -> dict[ProjectionName, Projection]:
        """Return the projections by name, in the order of computation."""
        found = {name: getattr(self, name) for name in PROJECTIONS}
        return {name: each for name, each in found.items() if each is not None}

    def matrices(self) -> dict[str, Tensor]:
        """Return the matrices of all experts by name, whatever projections hold them.

        Returns
        -------
        dict from str to Tensor
            ``up`` (E, F, H), ``down`` (E, H, F) and, of gated experts, ``gate`` (E, F, H).

        Examples
        --------
        >>> from tnmoe.nn import StackedProjection
        >>> gate_up, down = StackedProjection(4, 32, 8), StackedProjection(4, 8, 16)
        >>> matrices = Experts(gate_up=gate_up, down=down).matrices()
        >>> {name: tuple(matrix.shape) for name, matrix in matrices.items()}
        {'gate': (4, 16, 8), 'up': (4, 16, 8), 'down': (4, 8, 16)}
        """
        return _split_halves({name: each.weight() for name, each in self.projections().items()})

    def biases(self) -> dict[str, Tensor]:
        """Return the biases of all experts by the name of their matrix.

        Returns
        -------
        dict from str to Tensor
            (E, F) for ``up`` and ``gate``, (E, H) for ``down``; without an entry for a matrix that
            has no bias.
        """
        found = {name: each.expert_biases() for name, each in self.projections().items()}
        return _split_halves({name: bias for name, bias in found.items() if bias is not None})

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
            not in 0, …, E. On an accelerator, indices are not checked: it would synchronise. Also
            under ``torch.func`` if experts are spread over ranks.
        """
        self._check_shapes(hidden_states, top_k_index, top_k_weights)
        if is_transformed():
            if self.exchange is not None:
                raise InputError("torch.func does not support experts that are spread over ranks")
            return self._run_densely(hidden_states, top_k_index, top_k_weights)
        states = cast(hidden_states, autocast_dtype(hidden_states) or hidden_states.dtype)
        readable = values_are_readable(states)
        choices = Choices.of(top_k_index, top_k_weights, self.num_experts, readable)
        if self.exchange is not None:
            return self.exchange(hidden_states, top_k_index, top_k_weights)
        states = choices.zero_unrouted(states)
        products = self._products(self._load(states, choices.slots))
        network = self._slot_network(products, states)
        sums = sum_slots(network, choices, self._is_repeatable, self._may_take_turns)
        outputs = products.last.of_tokens([cast(total, states.dtype) for total in sums])
        return cast(outputs, hidden_states.dtype)

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
        """Return the products of a call; those of the last call if they are still the same."""
        if torch.compiler.is_compiling():
            return self._new_products(load)
        kept = _last_products.get(self)
        if kept is not None and kept[0] == load and kept[1].is_current():
            return kept[2]
        products = self._new_products(load)
        parts = [part for part in self.modules() if isinstance(part, Experts | Projection)]
        if not products.have_calls and all(getattr(p, "_holds_all_cores", True) for p in parts):
            _last_products[self] = load, Snapshot(parts), products
        else:
            _last_products.pop(self, None)
        return products

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A move to the meta device frees parameters, unless somebody keeps them.
        _last_products.pop(self, None)
        return super()._apply(fn, recurse)

    def _new_products(self, load: Load) -> Products:
        """Return the products of a call: of all projections into the inner size, and of down."""
        projections = self.projections()
        down = projections.pop("down")
        # Parts of a product bypass the call of a projection, and with it what wraps the projection.
        firsts = {
            name: (isinstance(each, Projection) and each.first_product(load))
            or FirstCall(each, partial(_work_of_call, each, load))
            for name, each in projections.items()
        }
        last = isinstance(down, Projection) and down.last_product(load)
        return Products(firsts, last or LastCall(down, partial(_work_of_call, down, load)))

    def _slot_network(self, products: Products, states: Tensor) -> SlotNetwork:
        """Return the network between what acts once per token, for the tokens of a call."""
        inputs, positions = products.states_of(states)
        # One row of gate_up holds both sides.
        width = self.intermediate_size * (1 if self.gate_up is None else 2)

        def function(rows: Tensors, weights: Tensors, groups: SlotOrder) -> Tensors:
            *of_firsts, of_last = products.split(weights)
            if self.gate is not None and products.are_calls:
                sides: Tensors = project_pair(self.gate, self.up, rows[0], groups)  # type: ignore[arg-type]
            else:
                sides = [
                    first.of_slots([rows[number] for number in numbers], own, groups)
                    for first, numbers, own in zip(
                        products.firsts, positions, of_firsts, strict=True
                    )
                ]
            return products.last.of_slots(self._activate(sides), of_last, groups)

        return SlotNetwork(
            inputs,
            products.weights,
            function,
            self.num_experts,
            width=max(width, *(part.shape[1] for part in inputs)),
            most_rows=rows_per_piece(width, self.hidden_size),
            has_calls=products.have_calls,
        )

    def _is_repeatable(self) -> bool:
        """Return whether activation and dropout give the same again, and train nothing."""
        sides = 2 if self.is_gated else 1
        return not (self.dropout and self.training) and is_repeatable(
            self.activation, sides, self.intermediate_size
        )

    def _may_take_turns(self, slots: int) -> bool:
        """Return whether no projection multiplies the rows of all experts together."""
        return not any(each.uses_joint_route(slots) for each in self.projections().values())

    def _activate(self, products: Sequence[Tensor]) -> Tensor:
        """Make the inputs of down, (..., F), of gate and up, or of gate_up, or of up alone."""
        if self.gate_up is not None:
            # Unlike chunks, slices may be changed in place.
            gates_and_ups, size = products[0], self.intermediate_size
            products = gates_and_ups[..., :size], gates_and_ups[..., size:]
        inner = self.activation(*products)
        return F.dropout(inner, self.dropout, self.training) if self.dropout else inner

    def _run_densely(self, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Apply every expert to every token, or to zeros where the token did not choose it.

        Under ``torch.func``, code may not depend on how many slots an expert has. So this costs E
        times as much.
        """
        table = DenseDispatch.of(index, weights, self.num_experts)
        rows = table.dispatch(states)
        projections = self.projections()
        down = projections.pop("down")
        products = [table.mask(project(rows, table)) for project in projections.values()]
        outputs = down(table.mask(self._activate(products)), table)
        return table.combine(outputs).to(states.dtype)


def _check_sizes(projections: Mapping[str, Projection]) -> None:
    """Raise an InputError if projections do not fit down."""
    down = projections["down"]
    for name, each in projections.items():
        rows = down.in_features * (2 if name == "gate_up" else 1)
        fits = down.num_experts, rows, down.out_features
        if name != "down" and (each.num_experts, each.out_features, each.in_features) != fits:
            raise InputError(f"{name} ({each}) does not fit down ({down}): it must be {fits}")


def _split_halves(tensors: Mapping[ProjectionName, Tensor]) -> dict[str, Tensor]:
    """Replace what gate_up has of every expert, (E, 2F, ...), by that of gate and that of up."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "gate_up":
            found["gate"], found["up"] = tensor.chunk(2, dim=1)
        else:
            found[name] = tensor
    return found


def _work_of_call(projection: Projection, load: Load) -> Work:
    """Count what a call of a projection, or of a wrapper of one, costs."""
    return projection.work_of_call(load)
