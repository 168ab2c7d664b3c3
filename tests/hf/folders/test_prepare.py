"""Conversion from folder to folder makes the checkpoints that loaded models are saved as."""

import json
import sys
from itertools import cycle

import pytest
import torch
import transformers
from safetensors.torch import save_file

import tnmoe as tn
from tests.hf.composites import PARTS
from tests.hf.families import LAYOUTS, MODELS, make, outputs, relative
from tnmoe import hf, nn
from tnmoe.hf.files.checkpoint import Checkpoint

CONFIG = hf.MPOEConfig(num_experts=3, sites=3, num_experts_per_tok=2, expert_noise=0.1)


def load(folder, like):
    return type(like).from_pretrained(folder).eval()


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layout"),
    # Not every family in every layout, which is for conversions in memory to test.
    [
        *zip(MODELS, cycle(("hidden", "residual"))),
        *(
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name, layout in zip(MODELS, cycle(("interleaved", "two matrices")))
        ),
    ],
)
def test_a_converted_folder_equals_the_saved_model_and_becomes_dense_again(name, layout, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    config = hf.MPOEConfig(
        num_experts=3, num_experts_per_tok=2, expert_noise=0.1, **LAYOUTS[layout]
    )
    conversion = hf.prepare_upcycle(tmp_path / "dense", config, seed=5)
    assert conversion.num_params >= hf.parameter_report(model, config).total.mpoe
    conversion.run(tmp_path / "mpoe", shard_bytes=50_000)
    torch.manual_seed(5)
    expected = hf.upcycle(model, config)
    loaded = load(tmp_path / "mpoe", expected)
    same(loaded, expected)
    assert relative(outputs(loaded, name), outputs(expected, name)) < 1e-5
    hf.prepare_export(tmp_path / "mpoe", to="dense").run(tmp_path / "back")
    average = hf.average_experts(expected)
    same(load(tmp_path / "back", average), average)
    stored = json.loads((tmp_path / "back" / "config.json").read_text())
    before = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert stored == before


@pytest.mark.parametrize(
    ("whole", "part"),
    list(dict.fromkeys((whole, part) for whole, layers, part, _ in PARTS if layers is None)),
    ids=lambda each: each.__name__,
)
def test_a_part_that_was_saved_alone_is_converted_and_exported_like_any_model(
    whole, part, tmp_path
):
    """Its tensors may keep the names that they have in the whole model."""
    whole().save_pretrained(tmp_path / "whole")
    model = part.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "dense")
    hf.prepare_upcycle(tmp_path / "dense", CONFIG, seed=5).run(tmp_path / "mpoe")
    torch.manual_seed(5)
    expected = hf.upcycle(model, CONFIG)
    same(load(tmp_path / "mpoe", expected), expected)
    hf.prepare_export(tmp_path / "mpoe", to="dense").run(tmp_path / "back")
    average = hf.average_experts(expected)
    same(load(tmp_path / "back", average), average)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "t5"])
@pytest.mark.parametrize("layout", ["interleaved", "hidden", "residual"])
def test_a_folder_becomes_the_ordinary_mixture_of_its_family(name, layout, tmp_path):
    config = hf.MPOEConfig(
        num_experts=3, num_experts_per_tok=1 if name == "t5" else 2, expert_noise=0.1,
        common_bias=True, **LAYOUTS[layout],
    )  # fmt: skip
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    hf.prepare_upcycle(tmp_path / "dense", config).run(tmp_path / "mpoe")
    mpoe = load(tmp_path / "mpoe", model)
    conversion = hf.prepare_export(tmp_path / "mpoe", to="moe")
    conversion.run(tmp_path / "moe")
    whole = hf.to_moe(mpoe)
    whole.save_pretrained(tmp_path / "whole")
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    moe = auto.from_pretrained(tmp_path / "moe").eval()
    assert type(moe) is type(whole)
    same(moe, whole)
    assert relative(outputs(moe, name), outputs(mpoe, name)) < 1e-5
    names = {each: set(Checkpoint(tmp_path / each).specs) for each in ("moe", "whole")}
    assert names["moe"] - names["whole"] <= {"lm_head.weight"}  # tied, and stored once or twice
    assert names["whole"] <= names["moe"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtypes(dtype, tmp_path):
    model = make("llama").to(dtype)
    model.save_pretrained(tmp_path / "dense")
    conversion = hf.prepare_upcycle(tmp_path / "dense", hf.MPOEConfig(num_experts=2, sites=3))
    conversion.run(tmp_path / "mpoe")
    mpoe = hf.from_pretrained(tmp_path / "mpoe")
    assert {each.dtype for each in mpoe.parameters()} == {dtype}
    assert relative(outputs(mpoe, "llama").float(), outputs(model, "llama").float()) < 0.05


def test_a_base_models_folder_may_name_the_class_with_a_head(tmp_path):
    """GPT-2's folder on the Hub is one."""
    model = make("gpt2")
    model.transformer.save_pretrained(tmp_path / "dense")
    entries = json.loads((tmp_path / "dense" / "config.json").read_text())
    entries["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(entries))
    hf.prepare_upcycle(tmp_path / "dense", hf.MPOEConfig(num_experts=2, sites=3)).run(
        tmp_path / "m"
    )
    loaded = load(tmp_path / "m", model)
    assert relative(outputs(loaded, "gpt2"), outputs(model, "gpt2")) < 1e-5


def test_only_the_chosen_layers_are_converted(tmp_path):
    model = make("t5")
    model.save_pretrained(tmp_path / "dense")
    config = hf.MPOEConfig(num_experts=2, sites=3, layers="decoder", every=2)
    conversion = hf.prepare_upcycle(tmp_path / "dense", config)
    assert [piece.name for piece in conversion.pieces if piece.make] == [
        "decoder.block.1.layer.2.DenseReluDense"
    ]
    conversion.run(tmp_path / "mpoe")
    loaded = load(tmp_path / "mpoe", model)
    assert relative(outputs(loaded, "t5"), outputs(model, "t5")) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_own_whole_matrices_where_no_mpo_was_chosen(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "dense")
    config = hf.MPOEConfig(num_experts=2, sites=3, matrices=["down"])
    report = hf.parameter_report(model, config)
    assert [each.name for each in hf.inspect_checkpoint(tmp_path / "dense", config).matrices] == [
        f"{ffn.name}.down" for ffn in hf.find_ffns(model)
    ]
    hf.prepare_upcycle(tmp_path / "dense", config).run(tmp_path / "mpoe")
    loaded = load(tmp_path / "mpoe", model)
    assert relative(outputs(loaded, name), outputs(model, name)) < 1e-5
    layers = [each for each in loaded.modules() if isinstance(each, nn.MPOExperts)]
    assert len(layers) == 3
    for layer in layers:
        assert isinstance(layer.up, nn.StackedProjection)
        assert isinstance(layer.down, nn.MPOProjection)
    assert loaded.num_parameters() == report.total.mpoe < report.total.moe
    hf.prepare_export(tmp_path / "mpoe", to="dense").run(tmp_path / "back")
    assert relative(outputs(load(tmp_path / "back", model), name), outputs(model, name)) < 1e-5


def test_ordinary_mixtures_are_made_and_exported_too(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "dense")
    config = hf.MPOEConfig(num_experts=2, layout="dense", expert_noise=0.1)
    hf.prepare_upcycle(tmp_path / "dense", config).run(tmp_path / "mixture")
    hf.prepare_export(tmp_path / "mixture", to="moe").run(tmp_path / "moe")
    mixture, moe = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        for name in ("mixture", "moe")
    )
    assert relative(outputs(moe, "llama"), outputs(mixture, "llama")) < 1e-5


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ONLY_GATES = hf.MPOEConfig(num_experts=2, sites=3, matrices=["gate"])


def ungated(folder):
    make("bert").save_pretrained(folder / "bert")
    return folder / "bert"


def upcycled(folder, name="llama", **settings):
    make(name).save_pretrained(folder / "dense-of-it")
    config = hf.MPOEConfig(num_experts=2, sites=3, **settings)
    hf.prepare_upcycle(folder / "dense-of-it", config).run(folder / "made")
    return folder / "made"


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (
            lambda f: (rewrite(f, model_type="novel"), hf.prepare_upcycle(f, CONFIG)),
            "no architecture with model_type 'novel': .* tnmoe.hf.register_family",
        ),
        (
            lambda f: (rewrite(f, architectures=["NovelModel"]), hf.prepare_upcycle(f, CONFIG)),
            "no architecture 'NovelModel': .* tnmoe.hf.register_family",
        ),
        (
            lambda f: (rewrite(f, architectures=["pipeline"]), hf.prepare_upcycle(f, CONFIG)),
            "no architecture 'pipeline'",
        ),
        (
            lambda f: (rewrite(f, architectures=["AutoModel"]), hf.prepare_upcycle(f, CONFIG)),
            "no architecture 'AutoModel'",
        ),
        (
            lambda f: (
                rewrite(upcycled(f), architectures=["pipeline"]),
                hf.from_pretrained(f / "made"),
            ),
            "no architecture 'pipeline'",
        ),
        (
            lambda f: hf.prepare_upcycle(ungated(f), ONLY_GATES),
            "names no matrix of the network, which has up, down",
        ),
        (
            lambda f: hf.inspect_checkpoint(ungated(f), ONLY_GATES),
            r"matrices=\['gate'\] names no matrix of the network, which has up, down",
        ),
        (
            lambda f: hf.inspect_checkpoint(ungated(f) / "config.json", ONLY_GATES),
            r"matrices=\['gate'\] names no matrix of the network, which has up, down",
        ),
        (
            lambda f: (rewrite(f, hidden_size="wide"), hf.prepare_upcycle(f, CONFIG)),
            "config.json does not suit a model of type 'llama'",
        ),
        *(
            (
                lambda f, entries=entries: (rewrite(f, **entries), hf.prepare_upcycle(f, CONFIG)),
                "config.json does not suit a model of type 'llama': " + message,
            )
            for entries, message in (
                ({"hidden_act": "novel"}, "KeyError: .*novel"),
                (
                    {"rope_parameters": {"rope_type": "novel", "rope_theta": 1e4}},
                    "KeyError: 'novel'",
                ),
                ({"hidden_size": -24}, ""),
                ({"hidden_size": 2**40, "vocab_size": 2**40}, "RuntimeError"),
                ({"pad_token_id": 2**70}, ""),
                ({"rms_norm_eps": [1e-6]}, ""),
            )
        ),
        (
            lambda f: (rewrite(f, model_type=["llama"]), hf.prepare_upcycle(f, CONFIG)),
            r"no architecture with model_type \['llama'\]",
        ),
        *(
            (
                lambda f, each=each: (
                    rewrite(f, architectures=each),
                    hf.prepare_upcycle(f, CONFIG),
                ),
                "architectures must be a list of names, got",
            )
            for each in ("LlamaForCausalLM", {"x": 1}, [7])
        ),
        (
            lambda f: (rewrite(f, num_hidden_layers=2**62), hf.prepare_upcycle(f, CONFIG)),
            "num_hidden_layers of config.json must be at most 1000000, got 4611686018427387904",
        ),
        (
            lambda f: (rewrite(f, num_labels=2**62), hf.prepare_upcycle(f, CONFIG)),
            "num_labels of config.json must be at most 1000000",
        ),
        (
            lambda f: (rewrite(f, num_hidden_layers=999_999), hf.prepare_upcycle(f, CONFIG)),
            r"config.json .* type 'llama': it has more than 1\d\d\d modules",
        ),
        (
            lambda f: (rewrite(f, intermediate_size=44), hf.prepare_upcycle(f, CONFIG)),
            r"gate_proj.weight is of shape \(40, 24\) in .*, its config.json says \(44, 24\)",
        ),
        (
            lambda f: (rewrite(f, vocab_size=51), hf.prepare_upcycle(f, CONFIG)),
            r"embed_tokens.weight is of shape \(50, 24\)",
        ),
        (
            lambda f: (rewrite(f, num_hidden_layers=4), hf.prepare_upcycle(f, CONFIG)),
            r"lacks 3 of the 12 tensors that LlamaForCausalLM needs from it: model.layers.3.mlp",
        ),
        (
            lambda f: hf.prepare_upcycle(upcycled(f), CONFIG),
            "is already converted or quantized",
        ),
        (
            lambda f: (
                rewrite(f, num_hidden_layers=20_000),
                hf.inspect_checkpoint(f / "config.json", CONFIG),
            ),
            "config.json .* type 'llama': it has more than 30000 modules",
        ),
        (lambda f: hf.prepare_upcycle(f, CONFIG, seed=-1), "seed must be an integer from 0 to"),
        (lambda f: hf.prepare_upcycle(f, CONFIG, seed=2**64), "seed must be an integer from 0 to"),
        (lambda f: hf.prepare_export(f, to="moe"), "is not an MPOE checkpoint"),
        (lambda f: hf.prepare_export(upcycled(f), to="onnx"), "to must be one of moe, dense"),
        (
            lambda f: hf.prepare_export(upcycled(f, every=2), to="moe"),
            "Mixtral has experts in all 3 layers, the model in 1",
        ),
        (
            lambda f: hf.prepare_export(upcycled(f, "bert"), to="moe"),
            "transformers has no ordinary mixture like BertModel",
        ),
    ],
)
def test_checkpoints_that_cannot_be_converted_are_refused_with_the_reason(
    conversion, message, tmp_path
):
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(tn.InputError, match=message):
        conversion(tmp_path)


def test_quantized_tensors_are_named(tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path)
    tensors = {name: each.contiguous() for name, each in model.state_dict().items()}
    tensors["encoder.layer.0.output.dense.weight"] = torch.zeros(24, 40, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(tn.InputError, match=r"output.dense.weight holds I8: quantized weights"):
        hf.prepare_upcycle(tmp_path, CONFIG)


def calls_of(work):
    """Number of calls of Python functions. Each step of a generator is a call.

    The module ``re`` is left out, since it caches regular expressions.
    """
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event == "call" and not frame.f_globals["__name__"].startswith("re")

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "work",
    [
        lambda dense, made: hf.prepare_upcycle(dense, CONFIG),
        lambda dense, made: hf.inspect_checkpoint(dense, CONFIG, weights=False),
        lambda dense, made: hf.prepare_export(made, to="moe"),
        lambda dense, made: hf.prepare_export(made, to="dense"),
        lambda dense, made: hf.from_pretrained(made).save_pretrained(made.parent / "saved"),
    ],
    ids=["upcycle", "inspect", "moe", "dense", "load and save"],
)
def test_preparing_takes_steps_in_proportion_to_the_layers(work, deep):
    work(*deep[0])  # imports
    few, more, most = (calls_of(lambda folders=folders: work(*folders)) for folders in deep)
    assert most - more < 1.1 * 2 * (more - few)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Dense and converted folders of models with 6, 12 and 24 layers."""
    found = []
    for layers in (6, 12, 24):
        folder = tmp_path_factory.mktemp(f"{layers}-layers")
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=layers,
            num_attention_heads=1,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(folder / "dense")
        hf.upcycle(model, CONFIG).save_pretrained(folder / "made")
        found.append((folder / "dense", folder / "made"))
    return found
