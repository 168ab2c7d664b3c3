"""The MoE layer: a router and experts, in the place of a feed-forward network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnmoe.errors import InputError, flag, number_in, one_of
from tnmoe.nn.experts import DenseExperts, Experts
from tnmoe.nn.mpo_experts import MPOExperts
from tnmoe.nn.routing.router import Router, TopKRouter
from tnmoe.nn.scopes import Scope
from tnmoe.options import ANY_LAYOUTS, AnyLayout

# Of the blocks of ignore_padding.
_masks: Scope[Tensor] = Scope("_masks")


class MPOMoE(nn.Module):
    """A mixture of experts, (..., H) → (..., H).

    A token that no expert takes, padding or one dropped for want of room, gets 0: behind a
    residual connection it passes through unchanged.

    Parameters
    ----------
    router : Router
        Chooses experts per token.
    experts : Experts
        ``MPOExperts``, or ``DenseExperts`` for an ordinary mixture.
    shared_expert : Module, optional
        A feed-forward network (..., H) → (..., H) that every token goes through besides its
        experts, whose output is added (DeepSeekMoE, arXiv:2401.06066, section 3.2).
    shared_gate : bool
        Weigh the shared expert's output by a sigmoid of a linear score of the token (Qwen2-MoE).
    dropout : float
        Probability, in training, of dropping a value of the output, for models whose feed-forward
        network ends so (GPT-2); for dropout between the projections see :class:`Experts`.

    Raises
    ------
    InputError
        If router and experts differ in their numbers of experts or hidden sizes, there is a gate
        for no shared expert, or the dropout is not in [0, 1].

    Notes
    -----
    An upcycled layer starts as the dense network under the conditions that the router names.
    With a shared expert the sum of both is what has to be that network: to start from it, give
    the routed experts zeros as their last matrix, or the shared one.

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
        shared_gate: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        routed = (router.num_experts, router.hidden_size)
        offered = (experts.num_experts, experts.hidden_size)
        if routed != offered:
            raise InputError(
                f"the router is for {routed[0]} experts of hidden size {routed[1]}, "
                f"the experts are {offered[0]} of hidden size {offered[1]}"
            )
        has_gate = flag("shared_gate", shared_gate)
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
        self.dropout = number_in("dropout", dropout, "[0, 1]")

    @classmethod
    def from_dense(
        cls,
        up: Tensor,
        down: Tensor,
        gate: Tensor | None = None,
        *,
        num_experts: int = 8,
        top_k: int = 1,
        layout: AnyLayout = "interleaved",
        router: Mapping[str, Any] | None = None,
        output_dropout: float = 0.0,
        **experts: Any,
    ) -> Self:
        """A layer that starts as one pretrained feed-forward network: sparse upcycling.

        With exact bonds and no noise it computes what the network computes, to rounding, as long
        as a token's weights sum to 1, which is the router's default. For another router make the
        parts yourself: ``MPOMoE(router, MPOExperts.from_dense(...))``.

        Parameters
        ----------
        up, gate : Tensor, shape (F, H)
            Pretrained matrices, laid out as in ``torch.nn.Linear.weight``.
        down : Tensor, shape (H, F)
            Pretrained matrix.
        num_experts : int
            Number of experts E.
        top_k : int
            Experts per token.
        layout : {"interleaved", "split", "dense"}
            How matrices split over sites, see :class:`MPOExperts`; ``dense`` gives every expert
            its own copies, see :class:`DenseExperts`.
        router : mapping, optional
            Further settings of :class:`TopKRouter` by name. Its weights are drawn from torch's
            global generator, on the device and in the dtype of ``up``.
        output_dropout : float
            The ``dropout`` of the layer.
        **experts
            Further arguments of :meth:`MPOExperts.from_dense`, or :meth:`DenseExperts.from_dense`:
            ``activation``, ``up_bias``, ``max_bond`` and others.

        Raises
        ------
        InputError
            If the matrices do not fit each other, or a setting is out of range.
        TypeError
            If there is no setting of a name.

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
        one_of("layout", layout, ANY_LAYOUTS)
        experts["num_experts"] = num_experts
        made: Experts
        if layout == "dense":
            made = DenseExperts.from_dense(up, down, gate, **experts)
        else:
            made = MPOExperts.from_dense(up, down, gate, layout=layout, **experts)
        settings = {"device": up.device, "dtype": up.dtype, **(router or {})}
        chosen = TopKRouter(made.hidden_size, num_experts, top_k, **settings)
        return cls(chosen, made, dropout=output_dropout)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Route every token through its experts.

        Parameters
        ----------
        hidden_states : Tensor, shape (..., H)
            With three axes the first two count as sequences of tokens.
        token_mask : Tensor with an entry per token, any shape, optional
            Tokens where it is 0 are padding: see :meth:`Router.forward`. By default the one of
            :func:`ignore_padding`, if any.

        Returns
        -------
        Tensor, shape (..., H)
        """
        if token_mask is None:
            token_mask = next(reversed(_masks.of(self)), None)
        # Other libraries' routers know no mask.
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
        return _masks.hand_over(self, super()._replicate_for_data_parallel())


@contextmanager
def ignore_padding(model: nn.Module, attention_mask: Tensor) -> Iterator[None]:
    """Let the MoE layers of a model see which tokens are padding.

    Padding then goes to no expert, takes no one's room and counts in no load. A model hands its
    feed-forward networks no mask, hence this block around its call. With activation checkpointing
    the backward pass calls the layers again, and belongs into the block as well. As with
    :func:`record_routing`, other threads and tasks see nothing of the block.

    Parameters
    ----------
    model : Module
        Anything that contains :class:`MPOMoE` layers which are all given these tokens: the
        encoder, say, of an encoder-decoder.
    attention_mask : Tensor, shape (B, S)
        0 where a token is padding.

    Raises
    ------
    InputError
        If there is no such layer; and in the block, if a layer is given another number of tokens.

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
    _masks.put(masks)
    try:
        yield
    finally:
        _masks.take(masks)
