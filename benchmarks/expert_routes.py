"""The routes of one projection side by side, and the building of matrices."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from expert_layers import BONDS, GROUPS, build_on, ffn_sizes, inputs_on
from library import OnTorch
from machine import take_turns, timed

import tnmoe as tn
from tnmoe.nn import Groups, MPOProjection
from tnmoe.nn.compute.matrices import MatrixBuilder, environments
from tnmoe.system.tables import format_table

ROUTES = ("joint", "per_expert", "rebuilt", "cached")
# A route that is predicted to take longer than this multiple of the fastest is not measured.
HOPELESS = 6


def check_plan(
    case: dict[str, Any], library: OnTorch, options: argparse.Namespace
) -> dict[str, Any]:
    """Time one projection by every route, and compare the planned route with the fastest."""
    hidden, inner = ffn_sizes(case)
    states, index, _ = inputs_on(options.device, case)
    groups = Groups.of(index.reshape(-1), case["experts"])
    states = states[groups.order // case["top_k"]]
    shapes: list[tuple[str, tn.MPOShape, int | None]] = [
        (f"bond {bond or 'exact'}", tn.MPOShape.for_matrix(inner, hidden, 5), bond)
        for bond in BONDS
    ] + [
        (f"split {group}", tn.MPOShape.split(inner, hidden, group, group), None) for group in GROUPS
    ]
    found, table = [], []
    for (name, shape, bond), mode in product(shapes, options.modes):
        make = partial(MPOProjection, case["experts"], shape, max_bond=bond)
        projection = build_on(options.device, make)
        planned = projection.plan(len(states), mode == "train")
        limit = HOPELESS * min(planned.seconds.values())
        calls = {
            route: partial(_one_route, projection, route, states, groups, mode == "train")
            for route in ROUTES
            if planned.seconds.get(route, float("inf")) <= limit
        }
        medians = _medians_when_cold(calls, library, options.repeats)
        fastest = min(medians, key=lambda route: medians[route])
        excess = medians[planned.route] / medians[fastest] - 1
        found.append({"shape": name, "mode": mode, "planned": planned.route, "excess": excess,
                      "seconds": medians, "predicted": planned.seconds})  # fmt: skip
        table.append([name, mode, planned.route, fastest, f"{excess:.0%}",
                      *(f"{1e3 * medians[r]:.2f}" if r in medians else "-" for r in ROUTES),
                      *(f"{1e3 * planned.seconds[r]:.2f}" if r in planned.seconds else "-"
                        for r in ROUTES)])  # fmt: skip
    headers = ["shape", "mode", "planned", "fastest", "excess", *ROUTES, *(f"~{r}" for r in ROUTES)]
    print(f"{case}\n{format_table(headers, table)}\n", flush=True)
    return {"routes": found}


def _medians_when_cold(
    calls: dict[str, Callable], library: OnTorch, repeats: int
) -> dict[str, float]:
    """Time calls in turns with cold caches, and return the medians.

    A model has many layers, so the arrays of a layer are in no cache when its turn comes.
    """
    other = torch.ones(2**25, device=library.device)
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rounds, start = 0, time.perf_counter()
    while rounds < 5 * repeats and (rounds < 3 or time.perf_counter() - start < repeats):
        for name, call in calls.items():
            other.add_(1)
            seconds[name].append(timed(call, library)[0])
        rounds += 1
    return {name: median(values) for name, values in seconds.items()}


def _one_route(
    projection: MPOProjection, route: str, states: torch.Tensor, groups: Any, training: bool
) -> None:
    projection.route = route
    if not training:
        with torch.no_grad():
            projection(states, groups)
        return
    projection.zero_grad(set_to_none=True)
    result = projection(states.detach().requires_grad_(), groups)
    result.backward(torch.ones_like(result))


@torch.no_grad()
def building(library: OnTorch, rate: float) -> list[dict[str, Any]]:
    """Time the building of 8 experts' matrices, and compare its rate with the machine's."""
    found, table = [], []
    for bond in BONDS:
        shape = tn.MPOShape.for_matrix(3072, 768, 5)
        projection = build_on(library.device, partial(MPOProjection, 8, shape, max_bond=bond))
        cores = projection.cores
        left, right = environments(cores)
        call = partial(_build_in_turn, MatrixBuilder(cores.center, cores.legs), left, right)
        call()
        seconds = median(take_turns({"": (call, timed(call, library)[0])}, library, 7)[""])
        columns = projection.center[0].numel()
        factor_rows = left.shape[1] * columns // right.shape[1]
        operations = left[0].numel() * columns + factor_rows * right[0].numel()
        share = 8 * 2 * operations / seconds / rate
        found.append({"bond": bond, "seconds": seconds, "share": share})
        table.append([bond or "exact", f"{1e3 * seconds:.1f}", f"{share:.0%}"])
    print(format_table(["bond", "ms", "of the rate"], table))
    return found


def _build_in_turn(builder: MatrixBuilder, left: torch.Tensor, right: torch.Tensor) -> None:
    turns = [(left, right)] if left.is_cuda else zip(left.split(1), right.split(1), strict=True)
    for lefts, rights in turns:
        products = builder.left_products(lefts)
        for part, _ in builder.row_blocks():
            builder.matrix_rows(builder.left_factor(products[:, part]), rights)
