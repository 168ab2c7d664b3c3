"""The loss of every step for TensorBoard, which nothing else needs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from tnmoe.errors import InputError


class Curve:
    """A writer of a run's losses in TensorBoard's format.

    Parameters
    ----------
    folder : Path or None
        Folder for this run only; with None nothing is written.
    begin : int
        First step to write. Later steps of a run that was killed are discarded and made again.
    """

    def __init__(self, folder: Path | None, begin: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=begin)

    def add(self, step: int, loss: Tensor) -> None:
        """Write the training loss of a step."""
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
