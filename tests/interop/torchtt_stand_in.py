"""A stand-in for torchTT, which pip has to compile: its class ``TT`` for a list of cores.

``test_torchtt.py`` compares the two where torchTT is installed.
"""

import torch


class TT:
    """A tensor if the cores have one leg each, a matrix if they have two."""

    def __init__(self, source):
        if not isinstance(source, list):
            raise NotImplementedError("the stand-in takes lists of cores only")
        if any(len(core.shape) not in (3, 4) for core in source):
            raise ValueError("cores have 3 or 4 axes")
        self.cores = source
        self.R = [source[0].shape[0], *(core.shape[-1] for core in source)]
        self.is_ttm = len(source[0].shape) == 4
        if self.is_ttm:
            self.M = [core.shape[1] for core in source]
        self.N = [core.shape[-2] for core in source]
        if any(len(core.shape) != len(source[0].shape) for core in source):
            raise ValueError("all cores have as many axes")
        if self.R[0] != 1 or [core.shape[0] for core in source] != self.R[:-1] or self.R[-1] != 1:
            raise ValueError("ranks do not match")

    def full(self):
        """Return the tensor, of a matrix with all output legs before all input legs."""
        whole = torch.ones(1, dtype=self.cores[0].dtype)
        for core in self.cores:
            whole = torch.tensordot(whole, core, dims=1)
        whole = whole[..., 0]
        if not self.is_ttm:
            return whole
        axes = range(whole.ndim)
        return whole.permute(*axes[::2], *axes[1::2])
