"""``tnmoe calibrate``: measure the machine for which tnmoe plans routes through experts."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to the parser."""
    parser = commands.add_parser(
        "calibrate",
        help="measure this machine, so that tnmoe plans the fastest route through experts for it",
        description=(
            "Measure for about a second how fast this machine multiplies and moves matrices, and "
            "store the rates in $TNMOE_CACHE or, by default, in the user's cache folder. Without "
            "them, tnmoe plans routes for a typical machine."
        ),
    )
    parser.add_argument("--device", help="torch device (default: cpu)", default="cpu")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    """Measure the machine, and print the rates and where they are stored."""
    from tnmoe.contraction.rates import rates_path
    from tnmoe.nn import calibrate
    from tnmoe.nn.compute.devices import usable_device

    rates = calibrate(options.device)
    print(f"large products   {rates.flops / 1e9:.4g} Gflop/s, half of it at depth "
          f"{rates.half_depth:.3g}")  # fmt: skip
    print(f"memory           {rates.bandwidth / 1e9:.3g} GB/s")
    print(f"a launch         {rates.launch * 1e6:.3g} µs")
    print(f"stored in {rates_path(usable_device(options.device).type)}")
