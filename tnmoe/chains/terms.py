"""Sums of products of chains, contracted site by site without forming them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tnmoe.backends import Array, Backend
from tnmoe.chains import algebra
from tnmoe.chains.precision import widened
from tnmoe.contraction.einsum import contract


@dataclass(frozen=True)
class Term:
    """A chain, or the product of two chains, whose bonds are never merged into cores."""

    chains: tuple[Sequence[Array], ...]

    def form(self, xp: Backend) -> Sequence[Array]:
        """Merge the bonds of two chains after all."""
        left, right = self.chains
        return algebra.compose(xp, left, right)

    def bond(self, site: int) -> int:
        """Return the dimension of the bond left of a site."""
        return prod(chain[site].shape[0] for chain in self.chains)

    def absorb(self, xp: Backend, carry: Array, site: int) -> Array:
        """Multiply a carry (r, D) from the left into a site: (r, out, in, D')."""
        cores = [chain[site] for chain in self.chains]
        carry = carry.reshape(carry.shape[0], *(core.shape[0] for core in cores))
        equation = "ra,aoib->roib" if len(cores) == 1 else "rac,aoxb,cxid->roibd"
        merged = contract(xp, equation, carry, *cores)
        return merged.reshape(*merged.shape[:3], -1)

    def pull(self, xp: Backend, sketch: Array, probe: Array, site: int) -> Array:
        """Contract a sketch (D', m) from the right with a site and a probe (l, out, in, m): (D, l).

        The probe is the core of a random operator.
        """
        cores = [chain[site] for chain in self.chains]
        sketch = sketch.reshape(*(core.shape[3] for core in cores), sketch.shape[1])
        equation = "aoib,loim,bm->al" if len(cores) == 1 else "aoxb,cxid,loim,bdm->acl"
        pulled = contract(xp, equation, *cores, probe, sketch)
        return pulled.reshape(-1, pulled.shape[-1])


class EntrywiseTerm(Term):
    """The entrywise product of two chains. Its products of matrices are batched over the legs."""

    def form(self, xp: Backend) -> Sequence[Array]:
        """Merge the bonds of both chains after all."""
        left, right = self.chains
        return algebra.entrywise(left, right)

    def absorb(self, xp: Backend, carry: Array, site: int) -> Array:
        """Multiply a carry (r, D) from the left into a site: (r, out, in, D')."""
        first, second = self._unfolded(site)
        carry = carry.reshape(carry.shape[0], first.shape[0], second.shape[0])
        half = contract(xp, "rac,alb->lrbc", carry, first)
        legs, rows, bond, _ = half.shape
        merged = half.reshape(legs, rows * bond, -1) @ xp.permute(second, (1, 0, 2))
        merged = xp.permute(merged.reshape(legs, rows, -1), (1, 0, 2))
        return merged.reshape(rows, *self.chains[0][site].shape[1:3], -1)

    def pull(self, xp: Backend, sketch: Array, probe: Array, site: int) -> Array:
        """Contract a sketch (D', m) from the right with a site and a probe (l, out, in, m): (D, l).

        The probe is the core of a random operator.
        """
        first, second = self._unfolded(site)
        probe = probe.reshape(probe.shape[0], -1, probe.shape[3])
        sketch = sketch.reshape(first.shape[2], second.shape[2], -1)
        half = contract(xp, "plm,bdm->lbdp", probe, sketch)
        legs, bond, other, width = half.shape
        half = xp.permute(first, (1, 0, 2)) @ half.reshape(legs, bond, -1)
        half = half.reshape(legs, -1, other, width)
        return contract(xp, "cld,ladp->acp", second, half).reshape(-1, width)

    def _unfolded(self, site: int) -> list[Array]:
        """Return both cores of a site with one axis for the legs: (D, out · in, D')."""
        cores = [chain[site] for chain in self.chains]
        return [core.reshape(core.shape[0], -1, core.shape[3]) for core in cores]


def squared_norm(xp: Backend, terms: Sequence[Term]) -> float:
    """Compute the squared Frobenius norm of a sum from the inner products of its terms."""
    total = 0.0
    for i, bra in enumerate(terms):
        for j, ket in enumerate(terms[: i + 1]):
            product = xp.to_numpy(_inner(xp, bra, ket)).real.item()
            total += product if i == j else 2 * product
    return total


def _inner(xp: Backend, bra: Term, ket: Term) -> Array:
    """Compute the inner product of two terms, site by site."""
    environment = xp.eye(1, like=bra.chains[0][0])
    for site in range(len(bra.chains[0])):
        half = ket.absorb(xp, environment, site)
        whole = xp.conj(bra.absorb(xp, xp.eye(bra.bond(site), like=half), site))
        environment = contract(xp, "aoib,aoid->bd", whole, half)
    return environment.reshape(())


def distance(xp: Backend, terms: Sequence[Term], cores: Sequence[Array]) -> float:
    """Compute the Frobenius norm of a sum of terms minus a chain, in double precision."""
    chain = [widened(xp, core) for core in cores]
    chain[-1] = -1.0 * chain[-1]
    return max(0.0, squared_norm(xp, [*terms, Term((chain,))])) ** 0.5
