"""A converted folder loads as the saved model with every class, or is refused."""

import copy
import json
import pickle
import subprocess
import sys
from itertools import cycle, product

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn as tnn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import tnmoe as tn
from tests.hf.composites import PARTS
from tests.hf.families import IDS, LAYOUTS, make, outputs, relative
from tnmoe import hf, nn

CONFIG = hf.MPOEConfig(num_experts=3, sites=3)


def converted(name, config=CONFIG):
    """Make a converted model whose experts differ, as after training."""
    model = hf.upcycle(make(name), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a converted Llama and the folder that holds it."""
    model, folder = converted("llama"), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(saved, tmp_path):
    """Return a copy of that folder, for a test to change."""
    for path in saved[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def entries_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, change):
    entries = entries_of(folder)
    change(entries)
    (folder / "config.json").write_text(json.dumps(entries))


def mixtures(model):
    return [each for each in model.modules() if isinstance(each, nn.MPOMoE)]


WITHOUT_TNMOE = """
import json, sys
import torch, transformers as tf
tf.logging.set_verbosity_error()
told = []
for name, folder, options in json.loads(sys.argv[1]):
    options = {key: getattr(torch, value) if "dtype" in key else value
               for key, value in options.items()}
    try:
        if name == "pipeline":
            tf.pipeline("text-generation", model=folder)
        else:
            getattr(tf, name).from_pretrained(folder, **options)
        told.append("it loaded")
    except Exception as error:
        told.append(str(error))
assert not any(name.startswith("tnmoe") for name in sys.modules)
print(json.dumps(told))
"""


def test_without_tnmoe_every_class_refuses_a_converted_folder_and_says_what_to_do(saved, tmp_path):
    llama = str(saved[1])
    hf.upcycle(PARTS[0][0](), CONFIG).save_pretrained(tmp_path)
    calls = [
        *((name, llama, {}) for name in (
            "AutoConfig", "AutoModel", "AutoModelForCausalLM", "LlamaConfig", "LlamaModel",
            "LlamaForCausalLM", "pipeline",
        )),
        *(("LlamaForSequenceClassification", llama, options) for options in (
            {"dtype": "float32"}, {"torch_dtype": "bfloat16"}, {"num_labels": 3},
            {"id2label": {0: "a", 1: "b", 2: "c"}}, {"ignore_mismatched_sizes": True},
        )),
        *((name, str(tmp_path), {}) for name in (
            "AutoModel", "CLIPModel", "CLIPTextModel", "CLIPVisionModel", "CLIPTextConfig",
            "CLIPTextModelWithProjection",
        )),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TNMOE, json.dumps(calls)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    for call, told in zip(calls, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert "import tnmoe.hf" in told, call


@pytest.mark.slow
def test_a_tower_that_is_not_converted_loads_without_tnmoe(tmp_path):
    config = hf.MPOEConfig(num_experts=2, sites=3, layers="text_model")
    hf.upcycle(PARTS[0][0](), config).save_pretrained(tmp_path)
    calls = json.dumps([("CLIPVisionModel", str(tmp_path), {})])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TNMOE, calls], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ["it loaded"]


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: hf.from_pretrained(folder),
        lambda folder: AutoModelForCausalLM.from_pretrained(folder),
        lambda folder: LlamaForCausalLM.from_pretrained(str(folder)),
        lambda folder: LlamaForCausalLM.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder)
        ),
        lambda folder: LlamaForCausalLM.from_pretrained(
            folder, config=transformers.LlamaConfig.from_json_file(folder / "config.json")
        ),
        lambda folder: LlamaForCausalLM.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(folder),
            state_dict=load_file(folder / "model.safetensors"),
        ),
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[0],
    ],
)
def test_every_way_in_gives_the_model_that_was_saved(load, saved):
    model, folder = saved
    loaded = load(folder).eval()
    assert relative(outputs(loaded, "llama"), outputs(model, "llama")) < 1e-6
    assert loaded.config.model_type == "llama"
    assert hf.config_of(loaded) == CONFIG


@pytest.mark.parametrize(
    ("whole", "layers", "part", "inputs", "layout"),
    [
        *((*case, "interleaved") for case in PARTS),
        # One layout around a module for each: both for all would take a minute more.
        *(
            pytest.param(*case, layout, marks=pytest.mark.slow)
            for case, layout in zip(PARTS, cycle(("hidden", "residual")))
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_part_of_a_converted_model_computes_what_it_did_in_the_dense_one(
    whole, layers, part, inputs, layout, tmp_path
):
    torch.manual_seed(0)
    dense = whole().eval()
    dense.save_pretrained(tmp_path / "dense")
    config = hf.MPOEConfig(num_experts=2, layers=layers, **LAYOUTS[layout])
    hf.prepare_upcycle(tmp_path / "dense", config).run(tmp_path / "planned")
    model = hf.upcycle(dense, config)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = part.from_pretrained(tmp_path / "dense").eval()(**inputs)[0]
        for folder in ("saved", "planned"):
            loaded = part.from_pretrained(tmp_path / folder).eval()
            assert relative(loaded(**inputs)[0], expected) < 1e-5
            loaded.save_pretrained(tmp_path / "again")
            again = type(loaded).from_pretrained(tmp_path / "again").eval()
            assert relative(again(**inputs)[0], expected) < 1e-5
            assert len(mixtures(again)) == len(mixtures(loaded))
    assert type(model).from_pretrained(tmp_path / "planned").config.tnmoe == model.config.tnmoe


def test_a_part_whose_tensors_transformers_does_not_find_is_refused(tmp_path):
    """In a Llava, a Llama's tensors have names that LlamaForCausalLM does not look for."""
    whole = next(make_whole for make_whole, *_ in PARTS if "llava" in make_whole.__name__)
    hf.upcycle(whole(), CONFIG).save_pretrained(tmp_path)
    with pytest.raises(tn.InputError, match="lacks 20 tensors of the feed-forward networks"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layout", "lost", "options"),
    # Every option meets every layout and every kind of loss.
    [
        (*pair, options)
        for pair, options in zip(
            product(LAYOUTS, ("mlp.router", "mlp.experts.up", "mlp.experts", "1.mlp")),
            cycle(({}, {"ignore_mismatched_sizes": True}, {"device_map": "cpu"})),
        )
    ],
)
def test_missing_tensors_of_mixtures_are_named(layout, lost, options, tmp_path):
    model = converted("llama", hf.MPOEConfig(num_experts=3, **LAYOUTS[layout]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if lost not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    gone = sorted(tensors.keys() - kept.keys())
    for load in (hf.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(tn.InputError, match=rf"lacks {len(gone)} tensors .*: {gone[0]}"):
            load(tmp_path, **options)


def test_tensors_that_a_given_state_dict_lacks_are_named(saved):
    model = saved[0]
    kept = {name: each for name, each in model.state_dict().items() if "1.mlp.router" not in name}
    with pytest.raises(
        tn.InputError, match=r"^state_dict lacks 1 tensors .*layers\.1\.mlp\.router"
    ):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["networks"].pop(),
        lambda record: record["networks"].clear(),
        lambda record: record["config"].update(matrices=["up"]),
        lambda record: record["config"].update(layout="dense"),
    ],
)
def test_a_record_that_does_not_suit_the_tensors_is_refused(change, folder):
    rewrite(folder, lambda entries: change(entries["tnmoe"]))
    with pytest.raises(tn.InputError, match="tensors of the feed-forward networks"):
        hf.from_pretrained(folder)
    with pytest.raises(
        tn.InputError, match=r"lacks|tensors of mixtures that its config\.json does"
    ):
        hf.prepare_export(folder, to="dense")


@pytest.mark.parametrize(
    "entries",
    [
        {"num_experts": 2}, {"num_experts": 5}, {"sites": 2}, {"max_bond": 4},
        {"shared_sites": "none"}, {"max_bond": {"down": 4}}, {"shared_sites": [0]},
        {"layout": "split", "sites": None},
        {"shapes": [{"out_dims": [4, 5, 2], "in_dims": [2, 3, 4]}]},
    ],
    ids=str,
)  # fmt: skip
def test_tensors_of_other_shapes_than_the_record_says_are_named(entries, folder):
    rewrite(folder, lambda all_entries: all_entries["tnmoe"]["config"].update(entries))
    named = r"model\.layers\.0\.mlp\..* is of shape \(.* its config\S* says \("
    with pytest.raises(tn.InputError, match=named):
        hf.from_pretrained(folder)
    with pytest.raises(tn.InputError, match=named):
        hf.prepare_export(folder, to="dense")


@pytest.mark.parametrize("entry", ["vocab_size", "hidden_size", "intermediate_size"])
def test_no_memory_is_taken_for_sizes_that_only_a_configuration_has(entry, folder, monkeypatch):
    rewrite(folder, lambda entries: entries.update({entry: 10**8}))
    monkeypatch.setattr(
        transformers.PreTrainedModel, "_move_missing_keys_from_meta_to_device", lambda *_: 1 / 0
    )
    with pytest.raises(tn.InputError, match=r"cannot be loaded as .*: its files hold less than"):
        hf.from_pretrained(folder)


def test_sizes_that_the_caller_gave_are_not_said_to_be_of_the_file(folder):
    named = r"lm_head.weight is of shape .*; ignore_mismatched_sizes=True draws it anew"
    with pytest.raises(tn.InputError, match=named) as caught:
        hf.from_pretrained(folder, vocab_size=7)
    assert "config.json" not in str(caught.value)


MORE = {
    "a core": lambda t: {"model.layers.0.mlp.experts.up.aux_7": torch.ones(3, 1, 2, 2, 1)},
    "a bias of a router": lambda t: {"model.layers.0.mlp.router.bias": torch.ones(3)},
    "a dense network": lambda t: {"model.layers.1.mlp.up_proj.weight": torch.ones(40, 24)},
    "a layer": lambda t: {
        name.replace("layers.0", "layers.9"): each.clone()
        for name, each in t.items()
        if "layers.0.mlp" in name
    },
}


@pytest.mark.parametrize("more", MORE)
def test_tensors_of_mixtures_that_are_not_described_are_named(more, folder):
    tensors = load_file(folder / "model.safetensors")
    added = MORE[more](tensors)
    save_file(tensors | added, folder / "model.safetensors", metadata={"format": "pt"})
    named = rf"holds {len(added)} tensors of mixtures .* describe: {min(added)}"
    with pytest.raises(tn.InputError, match=named):
        hf.from_pretrained(folder)
    with pytest.raises(tn.InputError, match=named):
        hf.prepare_export(folder, to="dense")


def test_layers_that_a_configuration_no_longer_has_are_named(folder):
    rewrite(folder, lambda entries: entries.update(num_hidden_layers=2))
    for read in (hf.from_pretrained, lambda path: hf.prepare_export(path, to="moe")):
        with pytest.raises(tn.InputError, match=r"holds 10 tensors of mixtures .*layers\.2\.mlp"):
            read(folder)


def test_tensors_under_two_names_are_refused(folder):
    """transformers alone would take the one that comes last."""
    tensors = load_file(folder / "model.safetensors")
    router = "layers.0.mlp.router.weight"
    twice = tensors | {router: torch.zeros_like(tensors[f"model.{router}"])}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    for read in (hf.from_pretrained, lambda path: hf.prepare_export(path, to="dense")):
        with pytest.raises(tn.InputError, match=rf"holds both {router} and model\.{router}"):
            read(folder)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "T5Model", "LlamaPreTrainedModel"])
def test_a_class_that_does_not_suit_the_model_is_named(name, folder):
    rewrite(folder, lambda entries: entries.update(architectures=[name]))
    for read in (hf.from_pretrained, lambda path: hf.prepare_export(path, to="dense")):
        with pytest.raises(
            tn.InputError, match=f"{name} is not a class for a model of type 'llama'"
        ):
            read(folder)


def test_a_type_without_a_model_of_its_own_is_named(folder):
    rewrite(folder, lambda entries: entries.update(model_type="clipseg_text_model", id2label={}))
    rewrite(folder, lambda entries: entries.pop("architectures"))
    for read in (hf.from_pretrained, lambda path: hf.prepare_export(path, to="dense")):
        with pytest.raises(tn.InputError, match="no model of type 'clipseg_text_model' by itself"):
            read(folder)


def test_load_biases_that_are_missing_are_named(tmp_path):
    config = hf.MPOEConfig(num_experts=3, sites=3, router={"load_bias": True})
    converted("llama", config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if "1.mlp.router.load_bias" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for read in (hf.from_pretrained, lambda path: hf.prepare_export(path, to="dense")):
        with pytest.raises(tn.InputError, match=r"lacks .*layers\.1\.mlp\.router\.load_bias"):
            read(tmp_path)


def test_what_has_another_size_is_drawn_anew_if_the_caller_allows_it(folder):
    stored = load_file(folder / "model.safetensors")
    rewrite(folder, lambda entries: entries["tnmoe"]["config"].update(num_experts=5))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    # Freed memory that is full of numbers is what uninitialised tensors would show.
    _ = [torch.full((1 << 16,), 1e30) for _ in range(50)]
    models = [
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True) for _ in range(2)
    ]
    for model in models:
        numbers = model.state_dict()
        assert len(mixtures(model)[0].experts.up.weight()) == 5
        for name, tensor in numbers.items():
            if tensor.shape == stored[name].shape:
                assert torch.equal(tensor, stored[name]), name
            else:
                assert 0 < float(tensor.abs().max()) < 10, name
        assert torch.isfinite(outputs(model.eval(), "llama")).all()


@pytest.mark.parametrize(
    "build",
    [
        AutoModelForCausalLM.from_config,
        LlamaForCausalLM,
        LlamaForCausalLM._from_config,
        lambda config: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).float(),
        lambda config: AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict())),
        lambda config: AutoModelForCausalLM.from_config(copy.deepcopy(config)),
        lambda config: AutoModelForCausalLM.from_config(pickle.loads(pickle.dumps(config))),
    ],
)
def test_a_converted_models_configuration_builds_a_converted_model(build, saved, tmp_path):
    model = build(AutoConfig.from_pretrained(saved[1])).eval()
    assert len(mixtures(model)) == 3
    assert not hf.find.all_ffns(model)
    assert torch.isfinite(outputs(model, "llama")).all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(outputs(loaded, "llama"), outputs(model, "llama")) < 1e-6


def test_a_model_that_is_built_anew_has_its_routers_losses_once(saved):
    model = LlamaForCausalLM(saved[0].config).train()
    ids = torch.arange(3, 17).view(2, 7)
    with nn.record_routing(model) as routing:
        loss = model(input_ids=ids, labels=ids).loss
    plain = model.eval()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, plain + 0.01 * routing.balance_loss())


def test_a_configuration_survives_saving_by_itself(saved, tmp_path):
    config = AutoConfig.from_pretrained(saved[1])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.tnmoe == config.tnmoe == saved[0].config.tnmoe
    assert type(again) is transformers.LlamaConfig
    assert "replaced" not in again.tnmoe
    assert entries_of(tmp_path)["tnmoe"] == entries_of(saved[1])["tnmoe"]


def test_labels_are_kept(tmp_path):
    entries = make("bert").config.to_dict() | {"id2label": {0: "no", 1: "yes", 2: "?"}}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**entries))
    hf.upcycle(model, CONFIG).save_pretrained(tmp_path)
    loaded = hf.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "?"}
    assert loaded.config.num_labels == 3


def test_what_a_user_writes_over_a_replaced_entry_is_kept(folder):
    rewrite(folder, lambda entries: entries.update(id2label={"0": "mine", "1": "yours"}))
    assert AutoConfig.from_pretrained(folder).id2label == {0: "mine", 1: "yours"}


@pytest.mark.slow
def test_folders_of_dense_models_are_written_as_transformers_alone_writes_them(tmp_path):
    make("llama").save_pretrained(tmp_path / "with")
    code = (
        "import sys, transformers\n"
        "transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "with"), str(tmp_path / "without")]
    subprocess.run(call, check=True, capture_output=True)
    assert entries_of(tmp_path / "with") == entries_of(tmp_path / "without")


@pytest.mark.parametrize(
    "options",
    [
        {"subfolder": "inner"},
        {"subfolder": "inner", "local_files_only": True},
        {"subfolder": "inner", "local_files_only": False, "dtype": torch.float32},
        {"subfolder": "inner", "output_loading_info": True},
        {"subfolder": "inner", "trust_remote_code": False, "attn_implementation": "eager"},
        {"subfolder": "inner", "device_map": "cpu", "use_safetensors": True},
    ],
)
def test_arguments_of_from_pretrained_are_passed_on(saved, tmp_path, options):
    saved[0].save_pretrained(tmp_path / "inner")
    loaded = hf.from_pretrained(tmp_path, **options)
    loaded = loaded[0] if isinstance(loaded, tuple) else loaded
    assert relative(outputs(loaded.eval(), "llama"), outputs(saved[0], "llama")) < 1e-6


@pytest.mark.parametrize("form", ["object", "folder", "file"])
def test_a_configuration_may_be_given(saved, folder, form, tmp_path):
    config = AutoConfig.from_pretrained(folder, attn_implementation="eager", rms_norm_eps=1e-5)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "given")
    given = {
        "object": config,
        "folder": str(tmp_path / "given"),
        "file": tmp_path / "given" / "config.json",
    }[form]
    loaded = hf.from_pretrained(saved[1], config=given)
    assert loaded.config.rms_norm_eps == 1e-5
    assert len(mixtures(loaded)) == 3


def test_the_configuration_of_a_dense_model_is_refused(saved):
    dense = make("llama").config
    with pytest.raises(tn.InputError, match="config, a LlamaConfig, is not of a converted model"):
        hf.from_pretrained(saved[1], config=dense)
    for cls in (LlamaForCausalLM, AutoModelForCausalLM):
        with pytest.raises(tn.InputError, match="holds a converted model, but the LlamaConfig"):
            cls.from_pretrained(saved[1], config=dense)


def test_a_model_converted_inside_another_one_is_not_saved_with_it(tmp_path):
    whole = PARTS[0][0]()
    hf.upcycle(whole.text_model, CONFIG)
    with pytest.raises(tn.InputError, match=r"text_model, a CLIPText.*layers='text_model'"):
        whole.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_model_put_together_of_converted_parts_is_saved_with_them(tmp_path):
    for side in ("encoder", "decoder"):
        config = make("bert").config
        config.is_decoder = config.add_cross_attention = side == "decoder"
        part = transformers.AutoModelForCausalLM if side == "decoder" else AutoModel
        hf.upcycle(part.from_config(config), CONFIG).save_pretrained(tmp_path / side)
    folders = (str(tmp_path / side) for side in ("encoder", "decoder"))
    pair = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(*folders).eval()
    pair.save_pretrained(tmp_path / "pair")
    loaded = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "pair").eval()
    assert len(mixtures(loaded)) == 6
    ids = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    with torch.no_grad():
        assert relative(loaded(**ids).logits, pair(**ids).logits) < 1e-6
    for model in (pair, loaded):
        for each in model.modules():
            if isinstance(each, tnn.Dropout):
                each.p = 0.0
        model.config.decoder_start_token_id = model.config.pad_token_id = 0
        plain = model(**ids, labels=IDS).loss
        with nn.record_routing(model) as routing:
            loss = model.train()(**ids, labels=IDS).loss
        torch.testing.assert_close(loss, plain + 0.01 * routing.balance_loss())


def test_a_dense_network_in_a_converted_model_is_not_saved(saved, tmp_path):
    model = LlamaForCausalLM.from_pretrained(saved[1])
    model.model.layers[1].mlp = make("llama").model.layers[1].mlp
    with pytest.raises(tn.InputError, match=r"says that model.layers.1 is a mixture"):
        model.save_pretrained(tmp_path / "lie")
    assert not (tmp_path / "lie").exists()


@pytest.mark.parametrize("change", ["drop", "repeat"])
def test_layers_that_moved_are_named_before_they_are_saved(change, tmp_path):
    config = hf.MPOEConfig(num_experts=3, sites=3, layers=[2])
    model = converted("llama", config)
    layers = list(model.model.layers)
    layers = layers[1:] if change == "drop" else [*layers, copy.deepcopy(layers[2])]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = tnn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    first, named = (1, [1]) if change == "drop" else (3, [2, 3])
    with pytest.raises(
        tn.InputError, match=rf"model\.layers\.{first}\.mlp of this Llama.*networks"
    ):
        model.save_pretrained(tmp_path / "moved")
    assert not (tmp_path / "moved").exists()
    model.config.tnmoe["networks"] = [f"model.layers.{number}" for number in named]
    model.save_pretrained(tmp_path / "moved")
    loaded = hf.from_pretrained(tmp_path / "moved").eval()
    assert relative(outputs(loaded, "llama"), outputs(model.eval(), "llama")) < 1e-6


class Halved(tnn.Linear):
    """A stand-in for a quantized layer: it computes in half precision in any model."""

    def forward(self, rows):
        return tnn.functional.linear(rows.half(), self.weight.half(), None).to(rows.dtype)


@pytest.fixture
def halving():
    """Register a quantizer that puts attention's linear layers in half precision."""
    from transformers.quantizers import HfQuantizer, auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @auto.register_quantization_config("halving")
    class Config(QuantizationConfigMixin):
        def __init__(self, quant_method="halving", **_):
            self.quant_method = quant_method

    @auto.register_quantizer("halving")
    class Quantizer(HfQuantizer):
        is_trainable = True

        def is_serializable(self, *_, **__):
            return True

        def _process_model_before_weight_loading(self, model, **_):
            for name, module in list(model.named_modules()):
                if type(module) is tnn.Linear and "self_attn" in name:
                    holder, _, leaf = name.rpartition(".")
                    sizes = (module.in_features, module.out_features)
                    new = Halved(*sizes, bias=False, device="meta")
                    setattr(model.get_submodule(holder), leaf, new)

    yield Config
    del auto.AUTO_QUANTIZATION_CONFIG_MAPPING["halving"], auto.AUTO_QUANTIZER_MAPPING["halving"]


def test_a_converted_model_is_quantized_as_any_other(saved, tmp_path, halving):
    model = AutoModelForCausalLM.from_pretrained(saved[1], quantization_config=halving()).eval()
    assert len(mixtures(model)) == 3
    assert sum(isinstance(each, Halved) for each in model.modules()) == 12
    assert relative(outputs(model, "llama"), outputs(saved[0], "llama")) < 1e-2
    model.save_pretrained(tmp_path)
    entries = entries_of(tmp_path)
    assert entries["quantization_config"]["quant_method"] == "halving"
    again = AutoModel.from_pretrained(tmp_path)
    assert len(mixtures(again)) == 3
    assert sum(isinstance(each, Halved) for each in again.modules()) == 12
    with pytest.raises(tn.InputError, match="already converted or quantized"):
        hf.upcycle(model, CONFIG)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_conversion_is_recorded_by_name(name):
    model = hf.upcycle(make(name), hf.MPOEConfig(num_experts=2, sites=3, every=2))
    names = [ffn.name for ffn in hf.find_ffns(make(name), every=2)]
    assert model.config.tnmoe["networks"] == names
