"""Parameter counts of a model: dense, as an ordinary mixture, and as MPOE."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from tnmoe.hf.checks import check_unconverted
from tnmoe.hf.config import MPOEConfig, check_config
from tnmoe.hf.find import find_ffns
from tnmoe.hf.layers import new_mixture
from tnmoe.hf.meta import meta_model
from tnmoe.system.tables import format_table


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a network, or of a whole model, in three forms.

    Attributes
    ----------
    name : str
    dense, moe, mpoe : int
        Of the dense form, of an ordinary mixture, and of a mixture with shared central cores.

    Examples
    --------
    >>> ParameterCount("layer", dense=100, moe=810, mpoe=270).ratio
    3.0
    """

    name: str
    dense: int
    moe: int
    mpoe: int

    @property
    def ratio(self) -> float:
        """Parameters of the ordinary mixture over those of MPOE."""
        return self.moe / self.mpoe


@dataclass(frozen=True)
class ParameterReport:
    """Parameters of a model and of each of its feed-forward networks.

    Attributes
    ----------
    num_experts : int
    ffns : tuple of ParameterCount
        Every network that is converted. The ordinary mixture has as many experts as MPOE; both
        counts include the router.
    total : ParameterCount
        The whole model. Tied parameters count once.

    Examples
    --------
    >>> from transformers import BertConfig
    >>> report = parameter_report(BertConfig(num_hidden_layers=1), MPOEConfig(num_experts=8))
    >>> round(report.ffns[0].ratio, 2)  # an ordinary mixture over MPOE
    4.9
    """

    num_experts: int
    ffns: tuple[ParameterCount, ...]
    total: ParameterCount

    def __repr__(self) -> str:
        return (
            f"ParameterReport(num_experts={self.num_experts}, ffns={len(self.ffns)}, "
            f"total={self.total})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"ratio": self.total.ratio}

    def __str__(self) -> str:
        rows = [
            [count.name, count.dense, count.moe, count.mpoe, f"{count.ratio:.2f}"]
            for count in (*self.ffns, self.total)
        ]
        headers = ["parameters", "dense", f"MoE of {self.num_experts}", "MPOE", "MoE/MPOE"]
        return format_table(headers, rows)


def parameter_report(model: nn.Module | PreTrainedConfig, config: MPOEConfig) -> ParameterReport:
    """Count the parameters that a converted model would have, without building it.

    Parameters
    ----------
    model : Module or PreTrainedConfig
        A dense model, or its configuration, from which a model is made on the meta device.
    config : MPOEConfig
        The conversion. The ordinary mixture has the same number of experts and the same routers.

    Returns
    -------
    ParameterReport

    Raises
    ------
    InputError
        If the model has no feed-forward network of a known family, or is already converted.

    Examples
    --------
    >>> from transformers import BertConfig
    >>> report = parameter_report(BertConfig(num_hidden_layers=1), MPOEConfig(num_experts=8))
    >>> report.ffns[0].dense, report.ffns[0].moe, report.ffns[0].mpoe
    (4722432, 37785600, 7710976)
    """
    check_config(config)
    dense = model if isinstance(model, nn.Module) else meta_model(model)
    check_unconverted(dense)
    ffns = tuple(
        ParameterCount(
            ffn.name,
            ffn.num_params,
            _count(new_mixture(ffn, replace(config, layout="dense"), "meta")),
            _count(new_mixture(ffn, config, "meta")),
        )
        for ffn in find_ffns(dense, config.layers, config.every)
    )
    whole = _count(dense)
    rest = whole - sum(count.dense for count in ffns)
    total = ParameterCount(
        "whole model",
        whole,
        rest + sum(count.moe for count in ffns),
        rest + sum(count.mpoe for count in ffns),
    )
    return ParameterReport(config.num_experts, ffns, total)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
