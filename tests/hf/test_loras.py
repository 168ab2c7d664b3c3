"""LoRA adapters as experts and experts as LoRA adapters, by logits through PEFT itself."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import tnmoe as tn
from tests.hf.families import make, outputs
from tnmoe import hf, nn

TARGETS = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "bert": [r"intermediate.dense", "output.dense"],
    "gpt2": ["c_fc", "mlp.c_proj"],
    "phi3": ["gate_up_proj", "down_proj"],
    "bart": ["fc1", "fc2"],
}
FFN_OF_BERT = r".*layer\.\d+\.(intermediate|output)\.dense"


def lora(name, folder, rank=3, seed=0, **settings):
    """Save a LoRA with random numbers, and return the outputs of the model with it."""
    targets = FFN_OF_BERT if name == "bert" else TARGETS[name]
    given = {"target_modules": targets, "r": rank, "lora_alpha": 5} | settings
    model = peft.get_peft_model(make(name), peft.LoraConfig(**given)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return outputs(model.base_model.model, name)


def send_all_to(model, expert, name="default"):
    """Let every router choose one expert for every token."""
    for module in model.modules():
        mixtures = getattr(module, "mpoe_mixtures", None)
        if mixtures is not None:
            router = mixtures[name].router
            index = torch.tensor([expert])

            def choose(states, *_, index=index, router=router):
                tokens = states.reshape(-1, states.shape[-1])
                one = torch.ones(len(tokens), 1, dtype=states.dtype)
                return tokens @ router.weight.T, one, index.expand(len(tokens), 1)

            router.forward = choose
    return model


@pytest.mark.parametrize("name", TARGETS)
def test_each_expert_is_its_lora(name, tmp_path):
    settings = [{"rank": 3}, {"rank": 5, "use_rslora": True}, {"rank": 2, "lora_alpha": 1}]
    folders = [tmp_path / str(number) for number in range(3)]
    expected = [
        lora(name, folder, seed=number, **own)
        for number, (folder, own) in enumerate(zip(folders, settings, strict=True))
    ]
    model = hf.from_loras(make(name), folders, top_k=1)
    for number, wanted in enumerate(expected):
        inner = send_all_to(copy.deepcopy(model), number).base_model.model
        torch.testing.assert_close(outputs(inner, name), wanted, rtol=1e-4, atol=1e-4)


def test_one_lora_is_one_expert_whatever_the_router(tmp_path):
    expected = lora("llama", tmp_path)
    model = hf.from_loras(make("llama"), [tmp_path])
    found = outputs(model.base_model.model, "llama")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_networks_that_no_lora_adapts_get_no_experts(tmp_path):
    lora("llama", tmp_path, layers_to_transform=[1, 2])
    model = hf.from_loras(make("llama"), [tmp_path])
    parts = [name.split(".")[4] for name, _ in model.named_parameters() if "mpoe_" in name]
    assert set(parts) == {"1", "2"}


def test_patterns_of_ranks_and_matrices_left_alone(tmp_path):
    settings = {"target_modules": ["up_proj"], "layers_to_transform": [1, 2]}
    expected = lora(
        "llama",
        tmp_path / "a",
        rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 7},
        **settings,
    )
    other = lora("llama", tmp_path / "b", seed=1, target_modules=["down_proj"])
    model = hf.from_loras(make("llama"), [tmp_path / "a", tmp_path / "b"], top_k=1)
    for number, wanted in enumerate((expected, other)):
        inner = send_all_to(copy.deepcopy(model), number).base_model.model
        torch.testing.assert_close(outputs(inner, "llama"), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TARGETS)
def test_loras_of_experts_give_the_logits_of_the_experts(name, tmp_path):
    folders = [tmp_path / "in" / str(number) for number in range(2)]
    for number, folder in enumerate(folders):
        lora(name, folder, rank=2 + number, seed=number)
    model = hf.from_loras(make(name), folders, top_k=1)
    errors = hf.to_loras(model, tmp_path / "out")
    assert errors == {"expert-0": 0.0, "expert-1": 0.0}
    for number in range(2):
        expected = outputs(send_all_to(copy.deepcopy(model), number).base_model.model, name)
        loaded = peft.PeftModel.from_pretrained(make(name), tmp_path / "out" / f"expert-{number}")
        found = outputs(loaded.eval().base_model.model, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def disturbed(**settings):
    torch.manual_seed(0)
    config = hf.MPOEAdapterConfig(**{"num_experts": 2, "top_k": 1} | settings)
    model = peft.get_peft_model(make("llama"), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "mpoe_" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    "settings", [{"sites": 4, "bond": 6}, {"layout": "hidden", "group_size": 8}]
)
def test_other_layouts_are_exact_at_full_rank_and_tell_their_error_below(settings, tmp_path):
    model = disturbed(**settings)
    errors = hf.to_loras(model, tmp_path / "full", rank=24)
    assert max(errors.values()) < 1e-6
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "full" / "expert-1").eval()
    expected = outputs(send_all_to(model, 1).base_model.model, "llama")
    found = outputs(loaded.base_model.model, "llama")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    errors = hf.to_loras(model, tmp_path / "low", rank=3)
    low, full = (
        load_file(tmp_path / kind / "expert-1" / "adapter_model.safetensors")
        for kind in ("low", "full")
    )
    squares = torch.zeros(2, dtype=torch.float64)
    for key in [key for key in full if "lora_A" in key]:
        products = [each[key.replace("lora_A", "lora_B")] @ each[key] for each in (low, full)]
        squares += torch.tensor([
            (products[0] - products[1]).square().sum(), products[1].square().sum()
        ])  # fmt: skip
    assert errors["expert-1"] == pytest.approx(float((squares[0] / squares[1]).sqrt()), rel=1e-3)


def test_an_expert_that_adds_nothing_has_no_error(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(make("llama"), hf.MPOEAdapterConfig(num_experts=2, bond=2))
    assert hf.to_loras(model, tmp_path / "out", rank=1) == {"expert-0": 0.0, "expert-1": 0.0}


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "up_proj"]}, r"adapts modules outside .*self_attn\.q_proj"),
        ({"use_dora": True}, "cannot take over use_dora=True"),
        ({"init_lora_weights": "pissa"}, "cannot take over init_lora_weights='pissa'"),
        ({"bias": "lora_only"}, "cannot take over bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"cannot take over modules_to_save=\['lm_head'\]"),
    ],
)
def test_loras_that_experts_cannot_be_are_refused_by_name(settings, message, tmp_path):
    lora("llama", tmp_path, **settings)
    model = make("llama")
    paths = [path for path, _ in model.named_modules()]
    with pytest.raises(tn.InputError, match=message):
        hf.from_loras(model, [tmp_path])
    assert [path for path, _ in model.named_modules()] == paths


def test_folders_that_hold_no_lora_of_the_model_are_refused(tmp_path):
    with pytest.raises(tn.InputError, match="a sequence of one folder at least, got"):
        hf.from_loras(make("llama"), [])
    with pytest.raises(tn.InputError, match="a sequence of one folder at least, got"):
        hf.from_loras(make("llama"), str(tmp_path))
    with pytest.raises(
        tn.InputError, match=r"no adapter of PEFT: there is no adapter_config\.json"
    ):
        hf.from_loras(make("llama"), [tmp_path])
    disturbed().save_pretrained(tmp_path / "experts")
    with pytest.raises(tn.InputError, match="holds an adapter of type 'MPOE', expected 'LORA'"):
        hf.from_loras(make("llama"), [tmp_path / "experts"])
    lora("bart", tmp_path / "bart")
    with pytest.raises(tn.InputError, match="adapts modules outside"):
        hf.from_loras(make("llama"), [tmp_path / "bart"])
    lora("llama", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    model = make("llama")
    layer = model.model.layers[0].mlp
    layer.up_proj, layer.gate_proj = torch.nn.Linear(24, 48), torch.nn.Linear(24, 48)
    layer.down_proj = torch.nn.Linear(48, 24)
    assert json.loads(file.read_text())["peft_type"] == "LORA"
    with pytest.raises(
        tn.InputError, match=r"down_proj is for a 24×40 matrix, and the model's is 24×48"
    ):
        hf.from_loras(model, [tmp_path / "lora"])


def spoil_config(folder):
    (folder / "adapter_config.json").write_text("{")


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def put_nan(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil_config, r"adapter_config\.json"),
        (cut, "is damaged or not a safetensors file"),
        (put_nan, r"the LoRA of model\.layers\.\d.* contains NaN or infinity"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            r"no adapter of PEFT: there is no adapter_model\.safetensors",
        ),
    ],
)
def test_damaged_folders_are_refused_and_the_model_stays(damage, message, tmp_path):
    lora("llama", tmp_path)
    damage(tmp_path)
    model = make("llama")
    paths = [path for path, _ in model.named_modules()]
    with pytest.raises(tn.InputError, match=message):
        hf.from_loras(model, [tmp_path])
    assert [path for path, _ in model.named_modules()] == paths


def test_what_follows_from_the_loras_is_no_setting(tmp_path):
    lora("llama", tmp_path)
    with pytest.raises(tn.InputError, match="bond, layers of the adapter follow from the LoRAs"):
        hf.from_loras(make("llama"), [tmp_path], bond=3, layers=[0])


def test_experts_that_were_added_are_written_too(tmp_path):
    model = disturbed()
    for module in model.modules():
        if isinstance(module, nn.MPOMoE):
            nn.add_experts(module, 1)
    assert list(hf.to_loras(model, tmp_path / "out")) == ["expert-0", "expert-1", "expert-2"]
    assert sorted(each.name for each in (tmp_path / "out").iterdir())[-1] == "expert-2"


@pytest.mark.parametrize("layout", ["residual", "hidden"])
def test_cores_with_nan_in_the_last_layer_leave_nothing_written(layout, tmp_path):
    model = disturbed(layout=layout)
    mixture = model.base_model.model.model.layers[2].mlp.mpoe_mixtures["default"]
    with torch.no_grad():
        next(iter(mixture.experts.down.parameters())).fill_(float("nan"))
    with pytest.raises(tn.InputError, match=r"layers\.2\.mlp\.down_proj contain NaN or infinity"):
        hf.to_loras(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_loras_are_written_to_an_empty_folder_only(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tn.InputError, match="exists and is no empty folder"):
        hf.to_loras(disturbed(), tmp_path)
    with pytest.raises(tn.InputError, match="rank must be a positive integer, got 0"):
        hf.to_loras(disturbed(), tmp_path / "new", rank=0)
    with pytest.raises(
        tn.InputError, match=r"no adapter of routed experts named 'other': it has def"
    ):
        hf.to_loras(disturbed(), tmp_path / "new", adapter_name="other")
    assert not (tmp_path / "new").exists()
