"""The loss of every step, for TensorBoard where that is wanted. Nothing else needs it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from tnmoe.errors import InputError


class Curve:
    """Losses of a run as TensorBoard reads them.

    Parameters
    ----------
    folder : Path or None
        Of this run alone; without it nothing is written.
    begin : int
        The step that comes first: later ones, of a run that was killed, are made again.
    """

    def __init__(self, folder: Path | None, begin: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=begin)

    def add(self, step: int, loss: Tensor) -> None:
        """The training loss of a step."""
        if self._writer is not None:
            self._writer.add_scalar("loss", loss.item(), step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Raise an InputError unless TensorBoard is installed."""
    if find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs TensorBoard: pip install tensorboard")
