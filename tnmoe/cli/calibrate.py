"""``tnmoe calibrate``: measure the machine that routes are planned for."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "calibrate",
        help="measure this machine, so that the fastest way through experts is planned for it",
        description=(
            "Measure for about a second how fast this machine multiplies and moves matrices, and "
            "store it in the user's cache folder, or in $TNMOE_CACHE. Without it, routes are "
            "planned for a typical machine."
        ),
    )
    parser.add_argument("--device", help="torch device (default: cpu)", default="cpu")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tnmoe.contraction.rates import rates_path
    from tnmoe.nn import calibrate
    from tnmoe.nn.compute.devices import usable_device

    rates = calibrate(options.device)
    print(f"large products   {rates.flops / 1e9:.4g} Gflop/s, half of it at depth "
          f"{rates.half_depth:.3g}")  # fmt: skip
    print(f"memory           {rates.bandwidth / 1e9:.3g} GB/s")
    print(f"a launch         {rates.launch * 1e6:.3g} µs")
    print(f"stored in {rates_path(usable_device(options.device).type)}")
