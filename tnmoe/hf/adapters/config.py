"""Settings of an adapter of routed experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from tnmoe.errors import InputError, check_one_of, check_positive_int
from tnmoe.hf.config import MPOEConfig
from tnmoe.nn.settings import GROUP_SIZE
from tnmoe.options import ADAPTER_LAYOUTS, AdapterLayout

# The default bond of ``residual``: the rank of an expert's part with two sites.
_BOND = 8

# Settings that mean here what they mean in MPOEConfig.
_OF_MOE = ("sites", "group_size", "layers", "every", "router", "balance_weight", "z_weight")


@dataclass
class MPOEAdapterConfig(PeftConfig):
    """Settings of an adapter: small routed experts beside every feed-forward network of a model.

    The model's own matrices stay as they are, frozen, and are what all experts share. A router per
    network and the experts' own cores are trained. At the start the model's function is unchanged.
    ``peft.get_peft_model`` takes this configuration.

    Parameters
    ----------
    num_experts : int
        Experts per network.
    top_k : int
        Experts per token.
    layout : {"residual", "hidden"}
        What an expert owns: a small MPO that it adds to each matrix, or a core that mixes each
        group of hidden units. See :class:`tnmoe.nn.MPOExperts`.
    bond : int, optional
        Largest bond of the MPOs in ``residual``, 8 by default. With two sites it is the rank, as
        of LoRA.
    sites : int, optional
        Sites of the MPOs in ``residual``, 2 by default.
    group_size : int or sequence of int
        Groups of ``hidden``.
    layers : sequence of int, or str, optional
        Networks that get experts, as for :func:`find_ffns`. All by default.
    every : int
        Of these networks, every ``every``-th.
    router : mapping
        Further settings of :class:`tnmoe.nn.TopKRouter`. A token's weights must sum to 1.
    balance_weight, z_weight : float
        Weights of the routers' losses in the model's loss, as in :class:`MPOEConfig`.
    base : mapping
        The networks of the model that the adapter was made for, by name: rows and columns of their
        matrices. PEFT stores them with the adapter, which then refuses other models.
    base_config : str, optional
        A hash of that model's configuration. Another one brings a warning. Making an adapter fills
        in both.
    **others
        Entries of PEFT's own configurations, such as ``modules_to_save``.

    Raises
    ------
    InputError
        If a setting is out of range, or does not suit the layout.

    Examples
    --------
    >>> import transformers
    >>> from peft import get_peft_model
    >>> from tnmoe.hf import MPOEAdapterConfig
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4,
    ... )
    >>> model = transformers.LlamaForCausalLM(config)
    >>> model = get_peft_model(model, MPOEAdapterConfig(num_experts=4, top_k=2, bond=4))
    >>> model.print_trainable_parameters()
    trainable params: 9,472 || all params: 34,208 || trainable%: 27.6894
    """

    num_experts: int = 8
    top_k: int = 2
    layout: AdapterLayout = "residual"
    bond: int | None = None
    sites: int | None = None
    group_size: int | Sequence[int] = GROUP_SIZE
    layers: Sequence[int] | str | None = None
    every: int = 1
    router: Mapping[str, Any] = field(default_factory=dict)
    balance_weight: float = 0.01
    z_weight: float = 0.0
    base: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    base_config: str | None = None
    modules_to_save: list[str] | None = None
    # PEFT reads and stores the paths of the modules that adapters replace.
    target_modules: list[str] | set[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # A configuration that a model filled in may serve for another model.
        self.is_loaded = bool(self.base)
        # tnmoe.hf.adapters.register adds the member.
        self.peft_type = PeftType["MPOE"]
        check_one_of("layout", self.layout, ADAPTER_LAYOUTS)
        self.num_experts = check_positive_int("num_experts", self.num_experts)
        self.top_k = check_positive_int("top_k", self.top_k)
        if self.top_k > self.num_experts:
            raise InputError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")
        if self.bond is not None:
            self.bond = check_positive_int("bond", self.bond)
            if self.layout == "hidden":
                raise InputError(
                    f"bond is for layout='residual', got bond={self.bond} with layout='hidden', "
                    "where group_size makes the bonds"
                )
        # Checks all other settings, and makes them plain numbers and lists, which JSON can hold.
        plain = self.to_moe_config().to_dict()
        for name in _OF_MOE:
            setattr(self, name, plain[name])
        if not self.router.get("normalize", True) or self.router.get("capacity_factor"):
            raise InputError(
                "an adapter needs weights that sum to 1 for every token, or it would change the "
                f"model's function at the start: got router={dict(self.router)}"
            )

    def note_base(self, base: dict[str, dict[str, list[int]]], digest: str | None) -> None:
        """Note what an adapter is made for.

        Parameters
        ----------
        base : dict
            Rows and columns of the matrices of every network, by the network's path.
        digest : str, optional
            A hash of the model's configuration.
        """
        self.base, self.base_config, self.target_modules = base, digest, list(base)
        self.is_loaded = False

    def to_moe_config(self) -> MPOEConfig:
        """Return the settings of the mixtures."""
        bond = self.bond or _BOND
        return MPOEConfig(
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            layout=self.layout,
            sites=self.sites,
            group_size=self.group_size,
            max_bond=bond if self.layout == "residual" else None,
            layers=self.layers,
            every=self.every,
            common_bias=True,
            router=self.router,
            balance_weight=self.balance_weight,
            z_weight=self.z_weight,
        )
