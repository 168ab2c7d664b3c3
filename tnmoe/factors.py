"""Sizes split into factors: one leg per site, as even as they can be."""

from __future__ import annotations

from functools import lru_cache

from tnmoe.errors import InputError, check_positive_int, short_repr

# A size is padded if its largest factor exceeds the geometric mean of its factors by more than
# this. 8 keeps 43 · 4⁴ (Llama's 11008) as it is, and sends primes such as 50257 to a neighbour.
_MAX_IMBALANCE = 8
# Largest size to split. The largest prime factors are then found in milliseconds.
_MAX_SIZE = 2**40
# No size up to there has as many prime factors.
_MAX_SITES = 100
# Number of sizes that padding tries. With many sites, few sizes have enough small factors.
_TRIES = 2**14


def factorize(n: int, sites: int) -> tuple[int, ...]:
    """Split ``n`` into ``sites`` factors, as even as they can be, the largest in the middle.

    Even factors give all sites of an MPO about the same freedom. A large middle factor puts the
    parameters into the central core, which experts share.

    Parameters
    ----------
    n : int
        Size to split, at least 1.
    sites : int
        Number of factors, at least 1.

    Returns
    -------
    tuple of int
        ``sites`` positive factors whose product is ``n``.

    Raises
    ------
    InputError
        If ``n`` is not an integer from 1 to 2⁴⁰, or ``sites`` is not one from 1 to 100.

    Examples
    --------
    >>> factorize(3072, 5), factorize(768, 5)
    ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    """
    n, sites = size_to_split("n", n), number_of_sites(sites)
    descending = _most_balanced(n, sites)[::-1]
    middle = sites // 2
    # The largest goes to the middle, the next ones alternately to its right and left.
    places = sorted(range(sites), key=lambda site: (abs(site - middle), site < middle))
    arranged = [0] * sites
    for site, factor in zip(places, descending, strict=True):
        arranged[site] = factor
    return tuple(arranged)


def padded_size(n: int, sites: int) -> int:
    """Find the smallest size from ``n`` up that splits into ``sites`` reasonably even factors.

    If no size within reach does, take the next product of 2, 3, 5 and 7 that does.
    """
    for size in range(n, n + _TRIES):
        if _has_even_factors(size, sites):
            return size
    size = _next_smooth(n)
    while not _has_even_factors(size, sites):
        size = _next_smooth(size + 1)
    return size


def size_to_split(name: str, size: int) -> int:
    """Return a size as an int; raise an InputError unless it can be split into factors."""
    size = check_positive_int(name, size)
    if size > _MAX_SIZE:
        raise InputError(
            f"{name} must be at most 2**40 to be split into legs, got {short_repr(size)}"
        )
    return size


def number_of_sites(sites: int) -> int:
    """Return a number of sites as an int; raise an InputError unless it is in range."""
    sites = check_positive_int("sites", sites)
    if sites > _MAX_SITES:
        raise InputError(f"sites must be at most {_MAX_SITES}, got {short_repr(sites)}")
    return sites


@lru_cache(maxsize=100_000)
def _primes(n: int) -> tuple[int, ...]:
    """Return the prime factors of n, ascending."""
    primes, divisor = [], 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            primes.append(divisor)
            n //= divisor
        divisor += 1 if divisor == 2 else 2
    return (*primes, n) if n > 1 else tuple(primes)


@lru_cache(maxsize=100_000)
def _divisors(n: int) -> tuple[int, ...]:
    divisors = {1}
    for prime in _primes(n):
        divisors |= {prime * divisor for divisor in divisors}
    return tuple(sorted(divisors))


@lru_cache(maxsize=100_000)
def _most_balanced(n: int, parts: int) -> tuple[int, ...]:
    """Return the ascending factors of n with the smallest sum, which are the most even ones."""
    if parts == 1:
        return (n,)
    primes = _primes(n)
    if parts >= len(primes):
        return (*(1,) * (parts - len(primes)), *primes)
    candidates = (
        tuple(sorted((smallest, *_most_balanced(n // smallest, parts - 1))))
        for smallest in _divisors(n)
        if smallest**parts <= n
    )
    return min(candidates, key=lambda factors: (sum(factors), factors[-1], factors))


def _has_even_factors(size: int, sites: int) -> bool:
    """Check whether a size has factors not much larger than their geometric mean."""
    largest = _MAX_IMBALANCE * size ** (1 / sites)
    rest, divisor = size, 2
    # A larger prime factor rules the size out. This is cheaper than finding all factors.
    while divisor <= largest and divisor * divisor <= rest:
        while rest % divisor == 0:
            rest //= divisor
        divisor += 1 if divisor == 2 else 2
    return rest <= largest and max(_most_balanced(size, sites)) <= largest


def _next_smooth(n: int) -> int:
    """Return the smallest product of 2, 3, 5 and 7 that is at least n."""
    power = 1 << (n - 1).bit_length()
    odd_products = {1}
    for prime in (3, 5, 7):
        multiples = odd_products
        while multiples := {prime * product for product in multiples if prime * product < power}:
            odd_products = odd_products | multiples
    return min((product << (-(-n // product) - 1).bit_length()) for product in odd_products)
