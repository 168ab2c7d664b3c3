"""Parameters trained beside PEFT's adapters are saved with them, or a warning says so."""

import warnings

import peft
import pytest
import torch
import transformers

import tnmoe as tn
from tests.hf.families import IDS, LAYOUTS, make
from tnmoe import hf, nn

WARNING = "PEFT does not save the trained parameters of {}: name them in modules_to_save"
LORA = {"r": 4, "target_modules": ["q_proj"]}
PROMPT = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
CONFIGS = {
    "lora": lambda **more: peft.LoraConfig(**LORA, **more),
    "dora": lambda **more: peft.LoraConfig(**LORA, use_dora=True, **more),
    "loha": lambda **more: peft.LoHaConfig(**LORA, **more),
}


@pytest.fixture
def base(tmp_path):
    """Return a converted model and its folder."""
    torch.manual_seed(0)
    config = hf.MPOEConfig(num_experts=3, sites=3, num_experts_per_tok=2, expert_noise=0.1)
    model = hf.upcycle(make("llama"), config)
    model.save_pretrained(tmp_path / "base")
    return model


def train(model, steps=3):
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_cores_and_routers_named_in_modules_to_save_reload_exactly_and_merge(kind, base, tmp_path):
    adapted = peft.get_peft_model(base, CONFIGS[kind](modules_to_save=["router", "experts"]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PEFT does not save")
        nn.train_auxiliary(adapted, also=["router", "lora_" if kind != "loha" else "hada_"])
        before = logits(adapted)
        train(adapted)
    assert (logits(adapted) - before).norm() > 0.01 * before.norm()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        hf.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(loaded.eval()), logits(adapted))
    if kind == "loha":
        return  # PEFT itself merges LoRA alone where modules_to_save have no weight
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted))
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(hf.from_pretrained(tmp_path / "merged")), logits(adapted))
    mixture = hf.to_moe(hf.from_pretrained(tmp_path / "merged")).eval()
    torch.testing.assert_close(logits(mixture), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["hidden", "two groups", "residual"])
@pytest.mark.parametrize("kind", ["lora", "dora", "saved"])
def test_adapters_of_the_module_that_experts_share_train_reload_and_merge(
    name, layout, kind, tmp_path
):
    torch.manual_seed(0)
    config = hf.MPOEConfig(num_experts=3, num_experts_per_tok=2, **LAYOUTS[layout])
    model = hf.upcycle(make(name), config)
    model.save_pretrained(tmp_path / "base")
    before = logits(model)
    modules = {"target_modules": ["base"]}
    if kind == "saved":
        modules = {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["base"]}
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, fan_in_fan_out=name == "gpt2", use_dora=kind == "dora", **modules),
    )
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-5)
    rows = []
    for module in adapted.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.register_forward_pre_hook(lambda _, given: rows.append(given[0][..., 0].numel()))
    train(adapted)
    assert set(rows) == {IDS.numel()}  # once per token, and no identity matrix
    assert (logits(adapted) - before).norm() > 0.01 * before.norm()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        hf.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(loaded.eval()), logits(adapted))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = hf.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(adapted), rtol=1e-4, atol=1e-5)


def test_originals_that_peft_keeps_are_neither_trained_nor_counted(base):
    plain = nn.train_auxiliary(base), len(nn.shared_parameters(base))
    config = CONFIGS["lora"](modules_to_save=["router", "experts"])
    adapted = peft.get_peft_model(base, config)
    assert (nn.train_auxiliary(adapted), len(nn.shared_parameters(adapted))) == plain
    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert trained
    assert all(".modules_to_save.default." in name for name in trained)
    nn.freeze_shared(adapted, frozen=False)
    shared = nn.shared_parameters(adapted)
    assert not any(
        each.requires_grad for name, each in adapted.named_parameters() if "original_mod" in name
    )
    groups = nn.parameter_groups(adapted, lr=1.0)
    assert {id(each) for each in groups[1]["params"]} == {id(each) for each in shared}
    optimizer = torch.optim.SGD(groups)
    with nn.GradientMask(optimizer, adapted, 1.0):
        adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
        before = [core.clone() for core in shared]
        optimizer.step()
    assert all(map(torch.equal, before, shared))


@pytest.mark.parametrize(
    ("saved", "also", "lost"),
    [
        (None, [], "experts"),
        (None, ["router"], "experts and router"),
        (["router"], ["router"], "experts"),
        (["experts"], ["router"], "router"),
    ],
)
def test_what_train_auxiliary_trains_and_peft_does_not_save_is_named(saved, also, lost, base):
    adapted = peft.get_peft_model(base, CONFIGS["lora"](modules_to_save=saved))
    with pytest.warns(UserWarning, match=WARNING.format(lost)) as caught:
        nn.train_auxiliary(adapted, also)
    assert caught[0].filename == __file__


def test_models_that_hold_adapters_without_being_pefts_are_warned_about_as_well(base):
    base.add_adapter(CONFIGS["lora"]())
    with pytest.warns(UserWarning, match=WARNING.format("experts")):
        nn.train_auxiliary(base)


def test_thawed_shared_cores_and_prompts_are_warned_about(base):
    adapted = peft.get_peft_model(base, PROMPT)
    with pytest.warns(UserWarning, match=WARNING.format("experts")):
        nn.freeze_shared(adapted, frozen=False)


def test_what_was_thawed_by_hand_is_warned_about_once_as_training_begins(base):
    adapted = peft.get_peft_model(base, CONFIGS["lora"]())
    for name, each in adapted.named_parameters():
        each.requires_grad_(each.requires_grad or ".experts." in name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted.eval()(input_ids=IDS, labels=IDS)
        assert not caught
        train(adapted)
    assert [str(each.message) for each in caught if "PEFT" in str(each.message)] == [
        WARNING.format("experts") + " of the adapter's configuration"
    ]


def test_nothing_is_said_of_models_without_adapters_or_merged_ones(base):
    adapted = peft.get_peft_model(base, CONFIGS["lora"]())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PEFT does not save")
        train(adapted, steps=1)
        merged = adapted.merge_and_unload()
        nn.train_auxiliary(merged, also=["router"])
        train(merged, steps=1)


def test_trainer_resumes_a_run_with_adapters_cores_and_routers(base, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]

    def trainer(steps, name):
        model = peft.get_peft_model(
            hf.from_pretrained(tmp_path / "base"),
            CONFIGS["lora"](modules_to_save=["router", "experts"]),
        )
        nn.train_auxiliary(model, also=["router", "lora_"])
        arguments = transformers.TrainingArguments(
            tmp_path / name, max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
            lr_scheduler_type="constant", save_strategy="steps",
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows)

    torch.manual_seed(0)
    whole = trainer(4, "whole")
    whole.train()
    torch.manual_seed(1)
    resumed = trainer(4, "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model.eval()), logits(whole.model.eval()))
    loaded = peft.PeftModel.from_pretrained(
        hf.from_pretrained(tmp_path / "base"), tmp_path / "whole/checkpoint-4"
    )
    torch.testing.assert_close(logits(loaded.eval()), logits(whole.model.eval()))


def test_a_folder_of_adapters_is_told_from_one_of_a_model(base, tmp_path):
    loaded = hf.from_pretrained(tmp_path / "base")
    peft.get_peft_model(loaded, CONFIGS["lora"]()).save_pretrained(tmp_path / "adapters")
    with pytest.raises(tn.InputError, match="holds adapters of PEFT and no model"):
        hf.from_pretrained(tmp_path / "adapters")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapters").eval()
    torch.testing.assert_close(logits(again), logits(base.eval()))
