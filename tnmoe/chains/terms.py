"""Sums of products of chains, contracted site by site without forming them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tnmoe.backends import Array, Backend
from tnmoe.chains.precision import widened
from tnmoe.contraction.einsum import contract


@dataclass(frozen=True)
class Term:
    """A product of one or two chains, whose bonds are never merged into cores."""

    chains: tuple[Sequence[Array], ...]

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
