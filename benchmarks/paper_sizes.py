"""The sizes behind MPOE's paper (arXiv:2203.01104), counted by tnmoe.hf.parameter_report.

Run: python benchmarks/paper_sizes.py [--json FILE]. The script needs only configurations and builds
no model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import GPT2Config, T5Config

from tnmoe import hf
from tnmoe.system.tables import format_table

MODELS = {
    "T5-base": T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12,
        architectures=["T5ForConditionalGeneration"],
    ),
    "GPT-2": GPT2Config(architectures=["GPT2LMHeadModel"]),
}  # fmt: skip

# The model, the number of experts, and N where every N-th network is converted.
CASES = [(name, experts, 1) for name in MODELS for experts in (4, 8, 16)]
CASES += [("T5-base", 128, 1), ("T5-base", 128, 2)]


def measure(name: str, experts: int, every: int) -> dict[str, object]:
    """Count the parameters of a whole model in all its forms."""
    row: dict[str, object] = {"model": name, "experts": experts, "every": every}
    for layout in ("interleaved", "split"):
        config = hf.MPOEConfig(num_experts=experts, every=every, layout=layout)
        total = hf.parameter_report(MODELS[name], config).total
        row |= {"dense": total.dense, "moe": total.moe, layout: total.mpoe}
        row[f"{layout} ratio"] = total.ratio
    return row


def main() -> None:
    """Print the table, and write it as JSON if a file is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = [measure(*case) for case in CASES]
    columns = ["model", "experts", "every", "dense", "moe", "interleaved", "interleaved ratio",
               "split", "split ratio"]  # fmt: skip
    table = [[f"{r[c]:.2f}" if isinstance(r[c], float) else r[c] for c in columns] for r in rows]
    print(format_table(columns, table))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
