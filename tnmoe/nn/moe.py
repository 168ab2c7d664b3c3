"""The MoE layer: a router and experts that replace a feed-forward network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.errors import InputError, check_bool, check_number_in, check_one_of
from tnmoe.nn.dense_experts import DenseExperts
from tnmoe.nn.experts import Experts
from tnmoe.nn.linear import weight_of_linear
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.pretrained_ffn import Source
from tnmoe.nn.routing.router import Router
from tnmoe.nn.routing.top_k import TopKRouter
from tnmoe.nn.scopes import ScopedValues
from tnmoe.options import ANY_LAYOUTS, AnyLayout

# Token masks that blocks of ignore_padding set for layers.
_token_masks: ScopedValues[Tensor] = ScopedValues("_token_masks")


class MPOMoE(nn.Module):
    """A mixture of experts, (..., H) → (..., H).

    A token that reaches no expert, because it is padding or a capacity dropped it, gets 0: behind
    a residual connection it passes through unchanged.

    Parameters
    ----------
    router : Router
        Chooses experts for every token.
    experts : Experts
        ``MPOExperts``, or ``DenseExperts`` for an ordinary mixture.
    shared_expert : Module, optional
        A feed-forward network (..., H) → (..., H) for all tokens. Its output is added to that of
        the routed experts (DeepSeekMoE, arXiv:2401.06066, section 3.2).
    shared_gate : bool
        Multiply the shared expert's output by a sigmoid of a linear score of the token
        (Qwen2-MoE).
    dropout : float
        Probability, in training, of dropping a value of the output, for models whose feed-forward
        network ends with dropout (GPT-2). For dropout between the projections see
        :class:`Experts`.

    Raises
    ------
    InputError
        If router and experts differ in their numbers of experts or hidden sizes,
        ``shared_gate`` is True without a shared expert, or the dropout is not in [0, 1].

    Notes
    -----
    The Notes of :class:`TopKRouter` say when an upcycled layer starts as the dense network. With a
    shared expert the sum of routed and shared experts must equal that network. To start from it,
    set the last matrix of the routed experts, or of the shared one, to zero.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4, top_k=2), MPOExperts(4, 8, 16, sites=2))
    >>> layer(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared_expert: nn.Module | None = None,
        *,
        shared_gate: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(router, experts)
        has_gate = check_bool("shared_gate", shared_gate)
        if has_gate and shared_expert is None:
            raise InputError("shared_gate=True needs a shared_expert")
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.shared_gate: nn.Linear | None = None
        if has_gate:
            weight = router.weight
            self.shared_gate = nn.Linear(
                weight.shape[1], 1, bias=False, device=weight.device, dtype=weight.dtype
            )
        self.dropout = check_number_in("dropout", dropout, "[0, 1]")

    @classmethod
    def from_dense(
        cls,
        up: Source,
        down: Source,
        gate: Source | None = None,
        *,
        num_experts: int = 8,
        top_k: int = 1,
        layout: AnyLayout = "interleaved",
        router: Mapping[str, Any] | None = None,
        output_dropout: float = 0.0,
        **experts: Any,
    ) -> Self:
        """Make a layer that starts as one pretrained feed-forward network: sparse upcycling.

        With exact bonds, or any bonds in ``residual``, and no noise the layer computes what the
        network computes, to rounding, if a token's weights sum to 1, which is the router's default.
        For another router make the parts yourself:
        ``MPOMoE(router, MPOExperts.from_dense(...))``.

        Parameters
        ----------
        up, gate : Tensor of shape (F, H), or linear Module
            Pretrained matrices, laid out as in ``torch.nn.Linear.weight``, or the modules that hold
            them.
        down : Tensor of shape (H, F), or linear Module
            Pretrained matrix.
        num_experts : int
            Number of experts E.
        top_k : int
            Experts per token.
        layout : {"interleaved", "split", "hidden", "residual", "dense"}
            What experts share and own, see :class:`MPOExperts`. With ``dense`` every expert has its
            own copies, see :class:`DenseExperts`.
        router : mapping, optional
            Further settings of :class:`TopKRouter` by name. Torch's global generator draws the
            router's weights, on the device and in the dtype of ``up``.
        output_dropout : float
            The ``dropout`` of the layer.
        **experts
            Further arguments of :meth:`MPOExperts.from_dense` or :meth:`DenseExperts.from_dense`,
            such as ``activation``, ``up_bias`` and ``max_bond``.

        Raises
        ------
        InputError
            If the matrices do not fit each other, or a setting is out of range.
        TypeError
            If a setting's name is unknown.

        Notes
        -----
        Komatsuzaki et al., arXiv:2212.05055.

        Examples
        --------
        >>> import torch
        >>> up, down = torch.randn(16, 8), torch.randn(8, 16)
        >>> layer = MPOMoE.from_dense(up, down, num_experts=4, top_k=2, activation="gelu", sites=3)
        >>> x = torch.randn(5, 8)
        >>> expected = torch.nn.functional.gelu(x @ up.T) @ down.T
        >>> torch.allclose(layer(x), expected, atol=1e-4)
        True
        """
        check_one_of("layout", layout, ANY_LAYOUTS)
        experts["num_experts"] = num_experts
        upcycled: Experts
        if layout == "dense":
            upcycled = DenseExperts.from_dense(up, down, gate, **experts)
        else:
            upcycled = MPOExperts.from_dense(up, down, gate, layout=layout, **experts)
        like = up if isinstance(up, Tensor) else weight_of_linear(up)
        settings = {"device": like.device, "dtype": like.dtype, **(router or {})}
        new_router = TopKRouter(upcycled.hidden_size, num_experts, top_k, **settings)
        return cls(new_router, upcycled, dropout=output_dropout)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Route every token through its experts.

        Parameters
        ----------
        hidden_states : Tensor, shape (..., H)
            With three axes, B sequences of S tokens.
        token_mask : Tensor with an entry per token, any shape, optional
            Tokens where it is 0 are padding: see :meth:`Router.forward`. By default the mask of
            the innermost block of :func:`ignore_padding`.

        Returns
        -------
        Tensor, shape (..., H)
        """
        if token_mask is None:
            token_mask = next(reversed(_token_masks.values_for(self)), None)
        # Routers of other libraries take no mask.
        inputs = (hidden_states,) if token_mask is None else (hidden_states, token_mask)
        _, weights, index = self.router(*inputs)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(tokens, index, weights).view_as(hidden_states)
        if self.shared_expert is not None:
            shared = self.shared_expert(hidden_states)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(hidden_states)) * shared
            output = output + shared
        return F.dropout(output, self.dropout, self.training) if self.dropout else output

    def _replicate_for_data_parallel(self) -> Self:
        return _token_masks.copy_to_replica(self, super()._replicate_for_data_parallel())


def _check_sizes(router: Router, experts: Experts) -> None:
    of_router = (router.num_experts, router.hidden_size)
    of_experts = (experts.num_experts, experts.hidden_size)
    if of_router != of_experts:
        raise InputError(
            f"the router is for {of_router[0]} experts of hidden size {of_router[1]}, "
            f"the experts are {of_experts[0]} of hidden size {of_experts[1]}"
        )


@contextmanager
def ignore_padding(model: nn.Module, attention_mask: Tensor) -> Iterator[None]:
    """Tell the MoE layers of a model which tokens are padding.

    Padding then goes to no expert, uses no capacity and counts in no load. Models pass no mask to
    their feed-forward networks, hence this block around a model's call. With activation
    checkpointing the backward pass calls the layers again, so it belongs in the block as well. As
    with :func:`record_routing`, other threads and tasks do not see the block.

    Parameters
    ----------
    model : Module
        Any module that contains :class:`MPOMoE` layers, all of which receive these tokens: the
        encoder of an encoder-decoder, for instance.
    attention_mask : Tensor, shape (B, S)
        0 where a token is padding.

    Raises
    ------
    InputError
        If the model has no such layer; in the block, if a layer receives another number of tokens.

    Examples
    --------
    >>> import torch
    >>> from tnmoe.nn import MPOExperts, TopKRouter
    >>> layer = MPOMoE(TopKRouter(8, 4), MPOExperts(4, 8, 16, sites=2))
    >>> with ignore_padding(layer, torch.tensor([[1, 1, 0]])):
    ...     output = layer(torch.randn(1, 3, 8))
    >>> (output == 0).all(-1)
    tensor([[False, False,  True]])
    """
    layers = [module for module in model.modules() if isinstance(module, MPOMoE)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no MPOMoE layer")
    masks = {id(layer): attention_mask for layer in layers}
    _token_masks.add(masks)
    try:
        yield
    finally:
        _token_masks.remove(masks)
