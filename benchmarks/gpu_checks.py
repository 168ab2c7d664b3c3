"""Checks of layers on a device, part of gpu.py: does CUDA compute what the mathematics says?

Every check compares with a loop over the experts' dense matrices, in double precision on the CPU.
A check that fails is a row with the error's text; the others go on.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from gpu import first_line
from torch import Tensor

from tnmoe.nn import DenseExperts, Experts, MPOExperts, MPOMoE, MPOProjection, TopKRouter
from tnmoe.nn.projection import Projection
from tnmoe.system.tables import format_table

# cuBLAS is deterministic with this setting alone; it must be there before the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Experts, hidden and intermediate size: multiples of what torch's grouped kernel takes.
E, H, INNER = 8, 64, 128
TOP_K = 2
MPO_LAYOUTS: dict[str, dict[str, Any]] = {
    "residual": {"layout": "residual", "max_bond": 8},
    "hidden": {"layout": "hidden", "group_size": 16},
    "split": {"layout": "split"},
    "interleaved": {"layout": "interleaved", "sites": 3},
    "nothing shared": {"sites": 3, "max_bond": 8, "shared_sites": "none"},
}
LAYOUTS = ("ordinary", *MPO_LAYOUTS)
# Layouts that whole models can have.
NAMES_IN_HF = {"ordinary": "dense"} | {
    name: name for name in ("residual", "hidden", "split", "interleaved")
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the row of a check says of its setting.
WRITTEN = ("layout", "dtype", "gated", "route", "tokens")
# Largest relative error in the Frobenius norm.
BOUNDS = {"float32": 1e-4, "bfloat16": 4e-2}


class NotHere(Exception):  # noqa: N818 - an answer, not an error
    """The device has nothing that the check could check."""


@dataclass(frozen=True)
class Setting:
    """A layer in some form, on a device."""

    layout: str
    dtype: str = "float32"
    gated: bool = True
    route: str | None = None
    tokens: int = 37
    device: str = "cuda"

    @cached_property
    def layer(self) -> Experts:
        """The layer under test; tokens visit all experts but the last."""
        layer = copy.deepcopy(self.exact).to(self.device, DTYPES[self.dtype])
        for module in layer.modules():
            if isinstance(module, MPOProjection):
                module.route = self.route
        return layer

    @cached_property
    def exact(self) -> Experts:
        """The same layer in double precision, with the numbers of the layer's own dtype."""
        torch.manual_seed(0)
        settings = {"gated": self.gated, "bias": True}
        if self.layout == "ordinary":
            layer: Experts = DenseExperts(E, H, INNER, "silu", **settings)
        else:
            layer = MPOExperts(E, H, INNER, "silu", **settings, **MPO_LAYOUTS[self.layout])
        with torch.no_grad():
            for parameter in layer.parameters():
                # What starts at zero, or equal for all experts, would hide errors.
                scale = parameter.std().item() or 0.1
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * scale)
        return layer.to(DTYPES[self.dtype]).double()

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """States, experts and weights, on the CPU; states and weights in double precision."""
        torch.manual_seed(1)
        index = torch.rand(self.tokens, E - 1).argsort(1)[:, :TOP_K]
        numbers = torch.randn(self.tokens, H), torch.rand(self.tokens, TOP_K)
        states, weights = (each.to(DTYPES[self.dtype]).double() for each in numbers)
        return states, index, weights

    def on_device(self, states: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Move inputs to the layer."""
        dtype = DTYPES[self.dtype]
        return (
            states.to(self.device, dtype),
            index.to(self.device),
            weights.to(self.device, dtype),
        )


def loop_over_experts(experts: Experts, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum the outputs of all experts, each of which multiplies all tokens by dense matrices."""
    matrices = {name: each.weight() for name, each in projections(experts).items()}

    def project(name: str, expert: int, rows: Tensor) -> Tensor:
        bias = projections(experts)[name].bias
        if bias is not None:
            bias = bias[min(expert, len(bias) - 1)]
        return F.linear(rows, matrices[name][expert], bias)

    result = torch.zeros_like(states)
    for expert in range(experts.num_experts):
        inner = project("up", expert, states)
        if "gate" in matrices:
            inner = F.silu(project("gate", expert, states)) * inner
        else:
            inner = F.silu(inner)
        share = (weights * (index == expert)).sum(1, keepdim=True)
        result = result + share * project("down", expert, inner)
    return result


def projections(experts: Experts) -> dict[str, Projection]:
    """Return the projections of a layer by name."""
    named = {"up": experts.up, "gate": experts.gate, "down": experts.down}
    return {name: each for name, each in named.items() if each is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Frobenius norm, or the absolute one where zero is due."""
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return ((found - expected).norm() / (expected.norm().item() or 1.0)).item()


def largest_error(call: Callable[..., Tensor], setting: Setting) -> float:
    """Return the largest error of a call's output, and of its gradients by all that it takes."""
    results = []
    for experts, function, move in (
        (setting.layer, call, setting.on_device),
        (setting.exact, lambda *given: loop_over_experts(setting.exact, *given), None),
    ):
        states, index, weights = move(*setting.inputs) if move else setting.inputs
        leaves = [states.clone().requires_grad_(), weights.clone().requires_grad_()]
        output = function(leaves[0], index, leaves[1])
        slopes = (torch.arange(H, device=output.device) % 5 - 2).to(output.dtype)
        wanted = [*leaves, *experts.parameters()]
        gradients = torch.autograd.grad(
            output, wanted, slopes.expand_as(output), allow_unused=True, materialize_grads=True
        )
        results.append([output, *gradients])
    return max(relative(*pair) for pair in zip(*results, strict=True))


# The checks return the largest relative error that they saw, or raise.


@torch.no_grad()
def outputs(setting: Setting) -> float:
    expected = loop_over_experts(setting.exact, *setting.inputs)
    return relative(setting.layer(*setting.on_device(*setting.inputs)), expected)


def gradients(setting: Setting) -> float:
    return largest_error(setting.layer, setting)


@torch.no_grad()
def choices_without_expert(setting: Setting) -> float:
    states, index, weights = setting.inputs
    index = index.clone()
    index[0] = index[1, 1] = E
    expected = loop_over_experts(setting.exact, states, index, weights)
    return relative(setting.layer(*setting.on_device(states, index, weights)), expected)


def autocast(setting: Setting) -> float:
    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast(setting.device, dtype=torch.bfloat16):
            return setting.layer(*inputs)

    return largest_error(call, setting)


def same_bits(setting: Setting) -> float:
    """Run twice in deterministic mode."""
    states, index, weights = setting.on_device(*setting.inputs)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            output = setting.layer(states, index, weights)
            found.append([output, *torch.autograd.grad(output.sum(), setting.layer.parameters())])
    finally:
        torch.use_deterministic_algorithms(False)
    if not all(map(torch.equal, *found)):
        raise AssertionError("two runs differ")
    return 0.0


@torch.no_grad()
def no_wait(setting: Setting) -> float:
    """Let torch raise an error where the CPU waits for the GPU."""
    inputs = setting.on_device(*setting.inputs)
    setting.layer(*inputs)
    with error_on_wait():
        found = setting.layer(*inputs)
    return relative(found, loop_over_experts(setting.exact, *setting.inputs))


def no_wait_in_training(setting: Setting) -> float:
    states, index, weights = setting.on_device(*setting.inputs)
    for block in (nullcontext(), error_on_wait()):
        with block:
            setting.layer(states, index, weights).sum().backward()
    return 0.0


@contextmanager
def error_on_wait() -> Iterator[None]:
    """Raise an error in the block where the CPU waits for the GPU."""
    if not torch.cuda.is_available():
        raise NotHere("no GPU to wait for")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def cuda_graph(setting: Setting) -> float:
    """Capture a decode step of router and experts, and replay it with other tokens."""
    router = TopKRouter(H, E, TOP_K, device=setting.device, dtype=DTYPES[setting.dtype])
    layer = MPOMoE(router, setting.layer).eval()
    states = setting.on_device(*setting.inputs)[0]
    captured = capture(layer, states)
    errors = []
    for scale in (1.0, -2.0):
        captured.given.copy_(states.flip(0) * scale)
        captured()
        errors.append(relative(captured.result, layer(captured.given).cpu()))
    return max(errors)


@dataclass(frozen=True)
class Captured:
    """A CUDA graph with the arrays that it reads and writes, which must live as long as it does."""

    graph: torch.cuda.CUDAGraph
    given: Tensor
    result: Tensor

    def __call__(self) -> None:
        self.graph.replay()


def capture(layer: Callable[[Tensor], Tensor], states: Tensor) -> Captured:
    """Capture a layer's call as a CUDA graph."""
    layer(states)
    with error_on_wait():
        # A capture in which the CPU waits for the GPU fails, and leaves torch in disorder.
        layer(states)
    given, stream = states.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer(given)
    return Captured(graph, given, result)


def compiled(setting: Setting) -> float:
    """Compile for training; the first call compiles for this number of tokens."""
    torch.compiler.reset()
    return largest_error(torch.compile(setting.layer, fullgraph=True), setting)


@torch.no_grad()
def compiled_inference(setting: Setting) -> float:
    torch.compiler.reset()
    call = torch.compile(setting.layer, fullgraph=True)
    expected = loop_over_experts(setting.exact, *setting.inputs)
    return relative(call(*setting.on_device(*setting.inputs)), expected)


@torch.no_grad()
def upcycled_model(setting: Setting) -> float:
    """Convert a small GPT-2 on the device and generate with it; it computes what it did before."""
    try:
        import transformers

        from tnmoe import hf
    except ModuleNotFoundError as error:
        raise NotHere(f"needs the package {error.name}") from error
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=H, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(setting.device).eval()
    ids = torch.randint(96, (2, 16)).to(setting.device)
    expected = model(ids).logits.cpu()
    name = NAMES_IN_HF[setting.layout]
    hf.upcycle(model, hf.MPOEConfig(num_experts=E, num_experts_per_tok=TOP_K, layout=name))
    model.generate(ids, max_new_tokens=4, do_sample=False)
    return relative(model(ids).logits, expected)


def settings(device: str, tiny: bool) -> Iterator[tuple[Callable[[Setting], float], Setting]]:
    """Yield all checks with their settings, cheap ones first."""
    routes = {"ordinary": (None,)}
    every = (None, "joint", "rebuilt", "per_expert")
    for layout, dtype, gated in product(LAYOUTS, DTYPES, (True, False)):
        given: dict[str, Any] = {"layout": layout, "dtype": dtype, "gated": gated, "device": device}
        for route in routes.get(layout, every):
            yield outputs, Setting(**given, route=route)
            yield gradients, Setting(**given, route=route)
        if layout != "ordinary":
            yield outputs, Setting(**given, route="cached")
        yield choices_without_expert, Setting(**given)
        for tokens in (0, 1):
            yield outputs, Setting(**given, tokens=tokens)
            yield gradients, Setting(**given, tokens=tokens)
    for layout, gated in product(LAYOUTS, (True, False)):
        yield autocast, Setting(layout, gated=gated, device=device)
        yield same_bits, Setting(layout, gated=gated, device=device)
    for layout, dtype, tokens in product(LAYOUTS, DTYPES, (1, 16)):
        for check in (no_wait, cuda_graph):
            yield check, Setting(layout, dtype, tokens=tokens, device=device)
    for layout, tokens in product(LAYOUTS, (16, 1)):
        # Torch has no kernel for the gradients of experts in float32.
        yield no_wait_in_training, Setting(layout, "bfloat16", tokens=tokens, device=device)
    for layout in NAMES_IN_HF:
        yield upcycled_model, Setting(layout, device=device)
    # The layouts that gain most from it come first: compiling takes long.
    for layout in LAYOUTS[1:2] if tiny else (*MPO_LAYOUTS, "ordinary"):
        yield compiled, Setting(layout, "bfloat16", device=device)
        yield compiled_inference, Setting(layout, "bfloat16", tokens=8, device=device)


def rows(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Yield the outcome of every check."""
    for check, setting in settings(device, tiny):
        half = setting.dtype == "bfloat16" or check is autocast
        bound = BOUNDS["bfloat16" if half else "float32"]
        row: dict[str, Any] = {"check": check.__name__.replace("_", " ")}
        row |= {
            name: vars(setting)[name] for name in ("layout", "dtype", "gated", "route", "tokens")
        }
        try:
            error = check(setting)
            # Written so that NaN does not pass.
            yield row | {"status": "passed" if error <= bound else "failed", "error": error}
        except NotHere as reason:
            yield row | {"status": "skipped", "message": str(reason)}
        except Exception as error:
            yield row | {"status": "failed", "message": first_line(error)}


def summary(rows: list[dict[str, Any]]) -> str:
    """Count the outcomes of every check by layout, and name the failures."""
    table = []
    for check in dict.fromkeys(row["check"] for row in rows):
        cells = [check]
        for layout in LAYOUTS:
            of = [row for row in rows if (row["check"], row["layout"]) == (check, layout)]
            tried = [row for row in of if row["status"] != "skipped"]
            passed = sum(row["status"] == "passed" for row in tried)
            cells.append(f"{passed}/{len(tried)}" if tried else "-")
        table.append(cells)
    failures: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "failed":
            reason = row.get("message") or "wrong numbers"
            failures.setdefault(reason, []).append(f"{row['layout']} {row['check']}")
    lines = [
        f"failed {len(names)} times: {reason} ({', '.join(dict.fromkeys(names))})"
        for reason, names in failures.items()
    ]
    return "\n".join([format_table(["passed", *LAYOUTS], table), *lines])
