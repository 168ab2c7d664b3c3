"""Trainer, PEFT and converted models: masks, losses, resumption, adapters."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import tnmoe as tn
from tests.hf.families import IDS, LAYOUTS, MASK, make
from tnmoe import hf, nn

CONFIG = hf.MPOEConfig(num_experts=3, num_experts_per_tok=2, sites=3, balance_weight=0.1)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=24):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 50, (count, 6), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


class Watch(TrainerCallback):
    """Record for every step whether it moved a central core, and whether an auxiliary one."""

    def __init__(self):
        self.moved, self.norms = [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        projection = model.get_submodule("model.layers.0.mlp.experts.up")
        self.before = [each.detach().clone() for each in (projection.center, projection.aux[0])]
        self.projection = projection

    def on_optimizer_step(self, args, state, control, **kwargs):
        now = self.projection.center, self.projection.aux[0]
        self.moved.append([bool((a != b).any()) for a, b in zip(self.before, now, strict=True)])


def trainer(folder, callback=None, steps=8, model=None, **arguments):
    torch.manual_seed(0)
    model = model or hf.upcycle(make("llama"), CONFIG)
    watch = Watch()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to=[], lr_scheduler_type="constant",
        disable_tqdm=True, seed=0,
        **{"save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2,
           "per_device_train_batch_size": 3, **arguments},
    )  # fmt: skip
    callbacks = [watch] if callback is None else [callback, watch]
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks), watch


def parameters(trainer):
    return [each.detach().clone() for each in trainer.model.parameters()]


@pytest.mark.parametrize("engine", ["optimizer", "autograd"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_masked_steps_of_trainer_spare_the_shared_cores(tmp_path, engine, accumulation):
    callback = hf.GradientMaskCallback(0.5, seed=4, engine=engine)
    run, watch = trainer(tmp_path, callback, gradient_accumulation_steps=accumulation)
    run.train()
    masked = [all(callback.mask.masks(step).values()) for step in range(8)]
    assert 0 < sum(masked) < 8
    assert watch.moved == [[not each, True] for each in masked]
    assert set(callback.mask.updates.values()) == {8 - sum(masked)}
    assert all(each.requires_grad for each in run.model.parameters())
    # Training is over: nothing is masked any more.
    run.model(input_ids=IDS, labels=IDS).loss.backward()
    assert run.model.model.layers[0].mlp.experts.up.center.grad is not None


@pytest.mark.parametrize("layout", ["hidden", "residual"])
@pytest.mark.parametrize("engine", ["optimizer", "autograd"])
def test_masked_steps_spare_the_modules_that_experts_share(tmp_path, layout, engine):
    config = hf.MPOEConfig(num_experts=3, num_experts_per_tok=2, **LAYOUTS[layout])
    model = hf.upcycle(make("llama"), config)
    modules = [each.experts.up.base for each in model.modules() if isinstance(each, nn.MPOMoE)]
    before = [each.weight.clone() for each in modules]
    callback = hf.GradientMaskCallback(1.0, engine=engine)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], save_strategy="no", disable_tqdm=True,
        learning_rate=1e-2, gradient_checkpointing=True,
    )  # fmt: skip
    run = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    run.train()
    assert all(map(torch.equal, before, (each.weight for each in modules)))
    experts = hf.average_experts(model).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(experts, before[0])  # what experts own has moved


@pytest.mark.parametrize("saved", [False, True])
def test_a_mask_without_a_probability_has_the_converted_models_own(tmp_path, saved):
    model = hf.upcycle(make("llama"), replace(CONFIG, mask_probability=0.5))
    if saved:
        model.save_pretrained(tmp_path / "model")
        model = hf.from_pretrained(tmp_path / "model")
    callback = hf.GradientMaskCallback(seed=4)
    run, watch = trainer(tmp_path, callback, model=model)
    run.train()
    masked = [all(callback.mask.masks(step).values()) for step in range(8)]
    assert 0 < sum(masked) < 8
    assert watch.moved == [[not each, True] for each in masked]


def test_a_dense_model_has_no_probability_of_its_own(tmp_path):
    callback = hf.GradientMaskCallback()
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[])
    run = Trainer(make("llama"), arguments, train_dataset=Rows(), callbacks=[callback])
    with pytest.raises(tn.InputError, match="LlamaForCausalLM is not a converted model"):
        run.train()


class Interrupt(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("engine", ["optimizer", "autograd"])
def test_a_run_after_an_interrupted_one_is_masked_once(tmp_path, engine):
    callback = hf.GradientMaskCallback(lambda step: float(step == 0), engine=engine)
    run, watch = trainer(tmp_path, callback, steps=3)
    run.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(Interrupt)
    watch.moved.clear()
    run.train()
    assert watch.moved == [[False, True], [True, True], [True, True]]
    assert set(callback.mask.updates.values()) == {2}


def test_masked_gradients_do_not_spend_the_norm_that_trainer_clips_to(tmp_path):
    run, _ = trainer(tmp_path, hf.GradientMaskCallback(1.0), steps=1, max_grad_norm=0.1)
    reference = hf.upcycle(make("llama"), CONFIG).train()
    reference.load_state_dict(run.model.state_dict())
    batch = next(iter(run.get_train_dataloader()))
    reference(**batch).loss.backward()
    shared = {id(each) for each in nn.shared_parameters(reference)}
    rest = [each for each in reference.parameters() if id(each) not in shared]
    expected = torch.nn.utils.get_total_norm([each.grad for each in rest])
    run.train()
    (norm,) = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert norm == pytest.approx(float(expected), rel=1e-4)


def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    whole, _ = trainer(tmp_path / "whole", hf.GradientMaskCallback(0.5, seed=4), save_strategy="no")
    whole.train()
    first, _ = trainer(
        tmp_path / "parts", hf.GradientMaskCallback(0.5, seed=4), steps=8,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    first.train()
    again, watch = trainer(tmp_path / "parts", hf.GradientMaskCallback(0.5, seed=4))
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert len(watch.moved) == 4
    for one, other in zip(parameters(whole), parameters(again), strict=True):
        torch.testing.assert_close(one, other)


def test_trainers_loss_holds_the_balance_loss_and_its_checkpoint_loads(tmp_path):
    run, _ = trainer(tmp_path, steps=2)
    model = run.model.train()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    model.eval()
    plain = model(**batch).loss
    model.train()
    assert (run.compute_loss(model, dict(batch)) - plain).item() > 0.05
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(IDS).logits, run.model.eval()(IDS).logits)


def masked_bert():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=50, num_hidden_layers=2, **sizes))


@pytest.mark.parametrize(
    "dense",
    [
        lambda: make("llama"),
        pytest.param(masked_bert, marks=pytest.mark.slow),
        pytest.param(lambda: make("t5"), marks=pytest.mark.slow),
    ],
)
def test_losses_of_routers_weigh_the_same_however_many_passes_make_a_step(tmp_path, dense):
    def loss(passes, weight):
        torch.manual_seed(0)
        model = hf.upcycle(dense(), replace(CONFIG, balance_weight=weight))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, learning_rate=0.0, report_to=[],
            per_device_train_batch_size=12 // passes, gradient_accumulation_steps=passes,
            save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=Rows()).train().training_loss

    added = [loss(passes, 1.0) - loss(passes, 0.0) for passes in (1, 2, 6)]
    # Few tokens are less evenly spread than many, so the losses themselves are not quite the same.
    assert added[1:] == pytest.approx(added[:1] * 2, rel=0.2)


def test_lora_on_attention_beside_experts_saves_only_what_is_trained(tmp_path):
    model = hf.upcycle(make("llama"), CONFIG)
    model.save_pretrained(tmp_path / "base")
    names = [name for name, _ in model.named_modules() if name.endswith("router")]
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=names),
    )
    trained = [name for name, each in adapted.named_parameters() if each.requires_grad]
    assert trained
    with nn.record_routing(adapted) as routing:
        losses = [adapted.train(mode)(input_ids=IDS, labels=IDS).loss for mode in (True, False)]
    expected = 0.1 * nn.Routing(routing.calls[:3]).balance_loss()
    torch.testing.assert_close(losses[0] - losses[1], expected)
    assert all("lora_" in name or "router" in name for name in trained)
    run, _ = trainer(tmp_path, model=adapted, steps=3)
    run.callback_handler.callbacks = [
        each for each in run.callback_handler.callbacks if not isinstance(each, Watch)
    ]
    run.train()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (tmp_path / "base" / "model.safetensors").stat().st_size / 4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(IDS).logits, adapted(IDS).logits)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(tn.InputError, match="engine must be one of auto, optimizer, autograd"):
        hf.GradientMaskCallback(0.5, engine="magic")
    with pytest.raises(tn.InputError, match=r"probability must be in \[0, 1\], got 1.5"):
        hf.GradientMaskCallback(1.5)
    run, _ = trainer(tmp_path, hf.GradientMaskCallback(0.5), model=make("llama"))
    run.callback_handler.callbacks = run.callback_handler.callbacks[:-1]
    with pytest.raises(tn.InputError, match="LlamaForCausalLM has no core that experts share"):
        run.train()
