"""Settings of a compression: how small a mixture becomes, and what its experts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from tnmoe.errors import (
    InputError,
    check_entries,
    check_number_in,
    check_one_of,
    check_positive_int,
    short_repr,
)
from tnmoe.hf.find import check_layers
from tnmoe.nn.settings import check_matrices
from tnmoe.options import (
    CALIBRATED_MOMENTS,
    COMPRESSED_LAYOUTS,
    MATRICES,
    CalibratedMoments,
    CompressedLayout,
    Matrix,
)

# The settings that say how small a model becomes, one of which is given.
LIMITS = ("keep", "num_bytes", "rtol")


@dataclass(frozen=True)
class CompressionConfig:
    """Settings for making the mixtures of a model smaller.

    Exactly one of ``keep``, ``num_bytes`` and ``rtol`` says how small. Within ``keep`` or
    ``num_bytes``, the bonds of all matrices are chosen such that the predicted error of all experts
    together is least.

    Parameters
    ----------
    keep : float, optional
        Share of the parameters of the chosen matrices that stays, above 0 and at most 1.
    num_bytes : int, optional
        Largest size of the whole model, in bytes of its tensors.
    rtol : float, optional
        Largest relative error of every matrix of a layer, over all its experts together. It is the
        error of the outputs for the inputs of the calibration, if there is one.
    layout : {"auto", "hidden", "residual", "low_rank"}
        What experts share. ``hidden``: a basis for the rows of ``up`` and ``gate``, and one for the
        columns of ``down``; a layer applies it once per token. ``residual``: a matrix, to which
        every expert adds one of low rank. ``low_rank``: nothing; every expert has matrices of low
        rank, each of a rank of its own. ``auto``: for every matrix the one that is predicted to
        lose least.
    matrices : sequence of "up", "gate", "down"
        Matrices that become smaller. The others stay as they are. ``gate`` and ``up`` are
        decomposed as one matrix, ``gate_up``, if both are among them.
    layers : sequence of int, or str, optional
        Mixtures to make smaller: positions among the model's mixtures, or a regular expression to
        search for in their names. All by default.
    moments : {"expert", "layer"}
        Whose inputs a calibration looks at in ``low_rank``. ``expert``: those of every expert. For
        E experts of the sizes H and F it then keeps E·(H² + min(F, H)²) numbers per layer.
        ``layer``: those of all experts of a layer together, H² + F² numbers; errors are larger
        then.
    damping : float
        Share of the identity in the second moments of a calibration's inputs. It keeps inputs that
        the calibration did not show from being free.

    Raises
    ------
    InputError
        If not exactly one limit is given, or a value is out of range.

    Examples
    --------
    >>> CompressionConfig(keep=0.6).layout
    'auto'
    """

    keep: float | None = None
    num_bytes: int | None = None
    rtol: float | None = None
    layout: CompressedLayout = "auto"
    matrices: Sequence[Matrix] = MATRICES
    layers: Sequence[int] | str | None = None
    moments: CalibratedMoments = "expert"
    damping: float = 0.01

    def __post_init__(self) -> None:
        limits = {name: getattr(self, name) for name in LIMITS}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            raise InputError(
                "give exactly one of keep, num_bytes and rtol, got "
                + (
                    ", ".join(f"{name}={short_repr(value)}" for name, value in given.items())
                    or "none"
                )
            )
        if self.keep is not None:
            self._set("keep", check_number_in("keep", self.keep, "(0, 1]"))
        if self.num_bytes is not None:
            self._set("num_bytes", check_positive_int("num_bytes", self.num_bytes))
        if self.rtol is not None:
            self._set("rtol", check_number_in("rtol", self.rtol, "[0, 1)"))
        check_one_of("layout", self.layout, COMPRESSED_LAYOUTS)
        check_one_of("moments", self.moments, CALIBRATED_MOMENTS)
        self._set("matrices", check_matrices(self.matrices))
        self._set("layers", check_layers(self.layers))
        self._set("damping", check_number_in("damping", self.damping, "[0, 1]"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts among which every matrix may choose."""
        return ("hidden", "residual", "low_rank") if self.layout == "auto" else (self.layout,)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the configuration that :meth:`to_dict` described.

        Parameters
        ----------
        data : mapping
            Missing entries have their defaults.

        Raises
        ------
        InputError
            If an entry is unknown or out of range.
        """
        check_entries(data, cls, "a compression's configuration")
        return cls(**data)


def check_compression(config: object) -> None:
    """Raise a TypeError unless this is a CompressionConfig."""
    if not isinstance(config, CompressionConfig):
        raise TypeError(f"config must be a CompressionConfig, got {type(config).__qualname__}")
