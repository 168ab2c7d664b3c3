"""Folders of models whose tensors are spread over ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from tnmoe.errors import InputError
from tnmoe.hf.checks import check_all_described, check_model
from tnmoe.hf.files.checkpoint import Checkpoint
from tnmoe.hf.files.folder import check_folder
from tnmoe.hf.find import mixtures_in
from tnmoe.hf.folders.skeleton import Skeleton
from tnmoe.hf.record import decode_entries


class Loading:
    """A model of a folder that has its numbers only after it was spread over ranks.

    Parameters
    ----------
    folder : path
        A folder that ``model.save_pretrained`` wrote.

    Attributes
    ----------
    model : PreTrainedModel
        On the meta device, with shapes and dtypes but no numbers: spread its experts
        (:func:`tnmoe.nn.parallel.shard_experts`), shard it (``fully_shard``), or both.

    Raises
    ------
    InputError
        If there is no such folder, its files are damaged, transformers has no such model, or the
        files lack tensors of the model or hold others.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> folder = tempfile.mkdtemp()
    >>> config = GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2)
    >>> GPT2LMHeadModel(config).save_pretrained(folder)
    >>> loading = prepare_load(folder)
    >>> loading.model.transformer.wte.weight.is_meta
    True
    >>> model = loading.run()
    >>> model.transformer.wte.weight.is_meta
    False
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        check_folder(Path(folder))
        source = Checkpoint(folder)
        self._skeleton = Skeleton(source, decode_entries(source.config), buffers=True)
        self.model: Any = self._skeleton.model
        self._names = [name for name, _ in self.model.named_parameters()]
        self._skeleton.match(self._names)
        used = {stored for name in self._names for stored in self._skeleton.stored(name)}
        used |= {self._skeleton.rename(name) for name, _ in self.model.named_buffers()}
        check_all_described(set(source.specs) - used, mixtures_in(self.model), folder)
        self._skeleton.load_buffers()

    def __repr__(self) -> str:
        return f"Loading({os.fspath(self._skeleton.source.folder)!r}, {type(self.model).__name__})"

    @torch.no_grad()
    def run(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """Read the numbers of this rank's parts of all parameters.

        The rank holds its parts, and one whole tensor at a time.

        Parameters
        ----------
        device : device or str
            Where the parameters go; that of the mesh for those that are spread.

        Returns
        -------
        PreTrainedModel
            The same model, in evaluation. Make the optimiser after this call, which replaces
            parameters.

        Raises
        ------
        InputError
            If the model has numbers already, or a file has changed or become shorter.
        """
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            raise InputError(f"{self!r} has run already: prepare another one")
        self._skeleton.source.check_unchanged()
        self.model._apply(lambda each: _off_meta(each, device))
        for name in self._names:
            _fill(self.model.get_parameter(name), self._skeleton.load(name))
        # Parameters that were one on the meta device are several now.
        self.model.tie_weights()
        return self.model.eval()


def prepare_load(folder: str | os.PathLike) -> Loading:
    """Open a folder to load its model over ranks, none of which holds all of it.

    Parameters
    ----------
    folder : path
        A folder that ``model.save_pretrained`` wrote.

    Returns
    -------
    Loading

    Raises
    ------
    InputError
        If there is no such folder, its files are damaged, transformers has no such model, or the
        files lack tensors of the model or hold others.

    Examples
    --------
    On every rank::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "ep"))
        loading = hf.prepare_load(folder)
        shard_experts(loading.model, mesh)
        model = loading.run("cuda")

    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from tnmoe import hf
    >>> dense = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> folder = tempfile.mkdtemp()
    >>> hf.upcycle(dense, hf.MPOEConfig(num_experts=4, sites=3)).save_pretrained(folder)
    >>> loading = hf.prepare_load(folder)
    >>> loading.model.device, loading.run().device
    (device(type='meta'), device(type='cpu'))
    """
    return Loading(folder)


def save_spread(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Save a model that is spread over ranks as an ordinary folder. Every rank calls this.

    The first rank gathers one tensor after the other in its CPU memory, and writes the folder:
    ``from_pretrained`` loads it on any number of ranks.

    Parameters
    ----------
    model : PreTrainedModel
        The model itself, not the module that wraps it.
    folder : path
        Where ``model.save_pretrained`` writes.

    Raises
    ------
    InputError
        If the configuration does not describe the model, or ``folder`` is a file; in a distributed
        run also if the first rank cannot write the folder. All ranks raise it.
    TypeError
        If ``model`` is not a model of transformers.

    Examples
    --------
    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from tnmoe import hf
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_layer=1, n_embd=16, n_head=2))
    >>> folder = tempfile.mkdtemp()
    >>> hf.save_spread(hf.upcycle(model, hf.MPOEConfig(num_experts=4, sites=3)), folder)
    >>> type(hf.from_pretrained(folder)).__name__
    'GPT2LMHeadModel'
    """
    check_model(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if not (distributed.is_available() and distributed.is_initialized()):
        _save(model, folder, state)
        return
    problem: list[str | None] = [None]
    if distributed.get_rank() == 0:
        try:
            _save(model, folder, state)
        except Exception as error:
            # The others would wait for the first rank, which must not leave alone.
            problem = [f"the first rank could not save the model in {folder}: {error}"]
    distributed.broadcast_object_list(problem)
    if problem[0] is not None:
        raise InputError(problem[0])


def _save(model: PreTrainedModel, folder: str | os.PathLike, state: dict[str, Any]) -> None:
    if Path(folder).is_file():
        # transformers only logs that, and writes nothing.
        raise InputError(f"{folder} is a file, not a folder")
    model.save_pretrained(folder, state_dict=state)


def _off_meta(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; one of the meta device gets memory, but no numbers."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def _fill(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy a tensor into a parameter, or this rank's part of it."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    mesh, placements = parameter.device_mesh, parameter.placements
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part = everywhere.redistribute(placements=placements)
    parameter.to_local().copy_(part.to_local())
