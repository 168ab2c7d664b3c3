"""The page's sections without peers: routes, building of matrices, sizes of models."""

from __future__ import annotations

from typing import Any

from report_parts import (
    NONE,
    Kind,
    escaped,
    finite,
    first_case,
    format_count,
    format_ratio,
    network,
    ratio,
    table,
    tokens,
)

ROUTES = """\
tnmoe knows four routes from the tokens of a layer to the outputs of its experts, and plans one with
a model of the machine:

- *joint*: nothing is built; the central core multiplies the tokens of all experts in one product.
- *per_expert*: the tokens of each expert go through its own chain of cores.
- *rebuilt*: each expert's matrix is built, used and dropped.
- *cached*: the matrices are built once and kept, at inference.

The benchmark ran one projection by every route that was predicted to take at most six times as long
as the fastest, with cold caches, and compared the planned route with the fastest one measured."""

BUILDING_LEGEND = """\
The benchmark built the matrices of 8 experts (3072x768, interleaved legs) from their cores, as a
training step does. The table shows the rate of the products that this takes, as a share of the rate
that a large matrix product reached in the same run. At 100 %, the machine multiplies as fast as it
can."""

SIZES_LEGEND = """\
Parameters of whole models, counted from their configurations: exact bonds, five sites, routers
included, experts in every network or in every second one. *Times smaller* divides the parameters of
the ordinary mixture by those of MPOE; for E experts it cannot exceed E."""


def _exceptions(result: dict[str, Any]) -> list[list[str]]:
    """List the cases in which another route is more than 10 % faster than the planned one."""
    lines = []
    for case in result["cases"]:
        for route in case["routes"]:
            if (finite(route["excess"]) or 0.0) > 0.1:
                seconds = route["seconds"]
                fastest = min(seconds, key=lambda name: seconds[name])
                slower = ratio(seconds[route["planned"]], seconds[fastest])
                mode = {"infer": "inference", "train": "training"}[route["mode"]]
                cells = (
                    network(case),
                    tokens(case),
                    escaped(route["shape"]),
                    mode,
                    route["planned"],
                    fastest,
                )
                lines.append([*cells, format_ratio(slower)])
    return lines


def _route_losses(result: dict[str, Any]) -> str:
    total = sum(len(case["routes"]) for case in result["cases"])
    missed = len(_exceptions(result))
    return (
        f"The planned route is more than 10 % slower than the fastest in {missed} of {total} cases."
    )


def _route_body(result: dict[str, Any]) -> str:
    headers = ("network", "tokens", "shape", "mode", "planned", "fastest", "planned / fastest")
    return f"{_route_losses(result)}\n\n{table(headers, _exceptions(result))}"


def _building_body(result: dict[str, Any]) -> str:
    rows = [
        [
            str(row["bond"] or "exact"),
            NONE if finite(row["share"]) is None else f"{row['share']:.0%}",
        ]
        for row in result["building"]
    ]
    return table(["bond", "share of the machine's rate"], rows)


def _sizes_body(rows: list[dict[str, Any]]) -> str:
    headers = ("model", "experts", "in every … network", "dense", "ordinary mixture",
               "MPOE interleaved", "times smaller", "MPOE split", "times smaller")  # fmt: skip
    cells = [
        [
            escaped(row["model"]),
            format_count(row["experts"]),
            ("1st", "2nd")[row["every"] - 1],
            *map(format_count, (row["dense"], row["moe"], row["interleaved"])),
            format_ratio(finite(row["interleaved ratio"])),
            format_count(row["split"]),
            format_ratio(finite(row["split ratio"])),
        ]
        for row in rows
    ]
    return table(headers, cells)


def _is_sizes(result: Any) -> bool:
    rows = result if isinstance(result, list) and result else [None]
    return all(isinstance(row, dict) and "moe" in row for row in rows)


PLAN = Kind(
    title="Routes: the planned one beside the fastest",
    legend=ROUTES,
    packages=("tnmoe", "torch"),
    fits=lambda result: "routes" in first_case(result),
    losses=_route_losses,
    body=_route_body,
)
BUILDING = Kind(
    title="Building matrices beside the machine's rate",
    legend=BUILDING_LEGEND,
    packages=("tnmoe", "torch"),
    fits=lambda result: isinstance(result, dict) and bool(result.get("building")),
    losses=lambda result: "",
    body=_building_body,
)
SIZES = Kind(
    title="Sizes of the models behind the paper",
    legend=SIZES_LEGEND,
    packages=(),
    fits=_is_sizes,
    losses=lambda rows: "",
    body=_sizes_body,
)
