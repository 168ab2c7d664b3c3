"""The cores of an MPO projection as parameters of a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tnmoe.errors import InputError, check_index
from tnmoe.nn.transforms import is_offloaded


class StoredCores(nn.Module):
    """A module that stores the cores of all sites: ``center``, and ``aux_0``, ``aux_1``, …

    Cores that experts own have an expert axis, (E, D, out, in, D'). A shared core is
    (D, out, in, D') at the centre and (1, D, out, in, D') at any other site.
    """

    center: nn.Parameter
    center_site: int
    shared_sites: frozenset[int]
    _owned_sites: frozenset[int]
    # Sites whose cores other layers have as well.
    _tied_sites: frozenset[int] = frozenset()
    # Names of the cores of all sites, left to right.
    _names: tuple[str, ...]
    _bond_dims: tuple[int, ...]

    def _store(self, cores: Sequence[Tensor], center_site: int) -> None:
        """Make parameters of the cores of all sites. Experts own the cores with five axes."""
        self.center_site = center_site
        self.shared_sites = frozenset(site for site, core in enumerate(cores) if core.ndim == 4)
        self._owned_sites = frozenset(range(len(cores))) - self.shared_sites
        # Parameters of the module itself and not of a list in it: whatever moves a module's
        # parameters in and out of memory around its forward, as accelerate does, must find them.
        aux_names = [f"aux_{number}" for number in range(len(cores) - 1)]
        self._names = (*aux_names[:center_site], "center", *aux_names[center_site:])
        stored = {
            name: core if core.ndim == 5 or name == "center" else core[None]
            for name, core in zip(self._names, cores, strict=True)
        }
        for name in ("center", *aux_names):  # the order of the state dict
            self._store_core(name, stored[name].detach())
        # Read once: between its uses a sharded core has another shape.
        self._bond_dims = tuple(core.shape[-4] for core in cores[1:])

    def _store_core(self, name: str, core: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(core.contiguous()))

    def _stored(self) -> tuple[nn.Parameter, ...]:
        """Return the cores of all sites as they are stored, left to right."""
        return tuple(map(self._core_named, self._names))

    def _core_named(self, name: str) -> nn.Parameter:
        stored: dict[str, Any] = self._parameters
        # Parametrized and pruned cores are not parameters, but attributes of another kind.
        return stored[name] if name in stored else getattr(self, name)

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """Inner bond dimensions, left to right."""
        return self._bond_dims

    @property
    def aux(self) -> tuple[nn.Parameter, ...]:
        """The cores of all sites but the centre, left to right."""
        return tuple(self._core_named(name) for name in self._names if name != "center")

    @property
    def _holds_all_cores(self) -> bool:
        """Whether all cores are parameters of this module, and not computed for every use."""
        return all(name in self._parameters for name in self._names)

    @property
    def last_core(self) -> nn.Parameter:
        """The stored core of the last site, on the input side."""
        return self._core_named(self._names[-1])

    @property
    def shared_cores(self) -> list[nn.Parameter]:
        """Cores that all experts share: every token of the layer updates them."""
        return [core for site in sorted(self.shared_sites) for core in self.parameters_at(site)]

    def parameters_at(self, site: int) -> list[nn.Parameter]:
        """Return the parameters that the core of a site is stored as.

        That is the core itself, or what a parametrization makes it from.

        Parameters
        ----------
        site : int
            From 0, left to right.

        Raises
        ------
        InputError
            If the core is only a part of a parameter.
        """
        name = self._names[site]
        if is_parametrized(self, name):
            return list(self.get_submodule(f"parametrizations.{name}").parameters())
        # torch.nn.utils.prune keeps the tensor itself under another name.
        for stored in (name, f"{name}_orig"):
            if isinstance(found := self._parameters.get(stored), nn.Parameter):
                return [found]
        raise part_of_larger(f"the core {name!r}")

    def core_at(self, site: int) -> nn.Parameter:
        """Return the stored core of a site, in one of the shapes that the class describes.

        Parameters
        ----------
        site : int
            From 0, left to right.

        Raises
        ------
        InputError
            If there is no such site.
        """
        return getattr(self, self._names[check_index("site", site, len(self._names))])

    def set_core(self, site: int, core: nn.Parameter) -> None:
        """Store a tensor, another projection's perhaps, as the core of a site.

        Parameters
        ----------
        site : int
            From 0, left to right.
        core : Parameter
            In the shape of the core that it replaces.

        Raises
        ------
        InputError
            If there is no such site.
        """
        setattr(self, self._names[check_index("site", site, len(self._names))], core)

    @property
    def is_gathered(self) -> bool:
        """Whether FSDP gathers the cores, or accelerate loads them, before every use.

        FSDP writes to them without leaving a trace, and accelerate makes new ones every time.
        Nothing that is built from them can be kept.
        """
        return is_gathered(self)


def is_gathered(module: nn.Module) -> bool:
    """Return whether a module gets other tensors before every use.

    FSDP gathers them, accelerate loads them, or :func:`mark_gathered` says so.
    """
    values = vars(module)
    return (
        is_offloaded(module)
        or values.get("_is_fsdp_managed_module", False)
        or values.get("_gets_tensors", False)
    )


def mark_gathered(module: nn.Module) -> None:
    """Say that a module gets other tensors before every use."""
    vars(module)["_gets_tensors"] = True


def part_of_larger(what: str) -> InputError:
    """Return the error of a tensor that FSDP keeps inside a larger parameter."""
    return InputError(
        f"{what} is only a part of a larger parameter: use FullyShardedDataParallel with "
        "use_orig_params=True, or fully_shard, and do not call this while a model runs"
    )
