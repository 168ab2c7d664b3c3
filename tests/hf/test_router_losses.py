"""A converted model's loss holds those of its routers, and its output shows their logits."""

import copy
import pickle

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import tnmoe as tn
from tests.hf.families import IDS, MASK, inputs, make
from tnmoe import hf, nn

PLAIN = {"num_experts": 3, "sites": 3, "num_experts_per_tok": 2}


def causal(**settings):
    return hf.upcycle(make("llama"), hf.MPOEConfig(**PLAIN, **settings))


def task_loss(model, **batch):
    """The loss without the routers', which are silent in evaluation; there is no dropout."""
    model.eval()
    with torch.no_grad():
        loss = model(**batch).loss
    model.train()
    return loss


@pytest.mark.parametrize(("balance", "z"), [(0.01, 0.0), (0.5, 0.1), (0.0, 0.2), (0.0, 0.0)])
def test_balance_and_z_losses_are_added_in_training_alone(balance, z):
    model = causal(balance_weight=balance, z_weight=z)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    expected = task_loss(model, **batch)
    with nn.record_routing(model) as routing:
        loss = model(**batch).loss
    added = balance * routing.balance_loss(MASK) + z * routing.z_loss(MASK)
    torch.testing.assert_close(loss, expected + added)
    loss.backward()
    router = model.model.layers[0].mlp.router
    assert (router.weight.grad != 0).any()
    assert model(input_ids=IDS).loss is None


def test_padding_counts_in_no_loss_wherever_the_mask_stands_among_the_arguments():
    model = causal(balance_weight=1.0)
    other = IDS.clone()
    other[MASK == 0] = 7
    labels = IDS.masked_fill(MASK == 0, -100)
    one, two, three = (
        model(ids, MASK, labels=labels).loss if positional else
        model(input_ids=ids, attention_mask=MASK, labels=labels).loss
        for ids, positional in ((IDS, False), (other, False), (other, True))
    )  # fmt: skip
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(two, three)


def test_encoders_and_decoders_have_masks_of_their_own():
    torch.manual_seed(0)
    model = make("t5")
    for each in model.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
        elif isinstance(getattr(each, "dropout", None), float):  # of attention
            each.dropout = 0.0
    hf.upcycle(model, hf.MPOEConfig(**PLAIN, balance_weight=1.0))
    labels = IDS.flip(1).masked_fill(MASK == 0, -100)
    batch = {"input_ids": IDS, "attention_mask": MASK.flip(1), "labels": labels}
    expected = task_loss(model, **batch)
    with nn.record_routing(model) as routing:
        loss = model(**batch).loss
    parts = [
        nn.Routing([call]).balance_loss(MASK if "decoder" in call.name else MASK.flip(1))
        for call in routing.calls
    ]
    assert len(parts) == 6
    torch.testing.assert_close(loss, expected + torch.stack(parts).mean())


def test_router_logits_are_in_the_output_when_asked_for():
    model = causal()
    assert "router_logits" not in model(input_ids=IDS)
    for mode in (True, False):
        model.train(mode)
        logits = model(input_ids=IDS, output_router_logits=True).router_logits
        assert [tuple(each.shape) for each in logits] == [(14, 3)] * 3
    model.config.output_router_logits = True
    assert len(model(input_ids=IDS).router_logits) == 3
    assert "router_logits" not in model(input_ids=IDS, output_router_logits=False)
    model.generate(IDS, max_new_tokens=2, pad_token_id=0, eos_token_id=None)


def test_what_a_model_adds_is_saved_with_it_and_goes_along_with_copies(tmp_path):
    config = hf.MPOEConfig(**PLAIN, balance_weight=0.7)
    model = hf.upcycle(make("bert"), config)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for each in (classifier, copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1])}
        expected = task_loss(each, **batch)
        with nn.record_routing(each) as routing:
            loss = each(**batch).loss
        torch.testing.assert_close(loss, expected + 0.7 * routing.balance_loss(MASK))


@pytest.mark.parametrize("way", ["compiled", "checkpointed"])
def test_the_losses_and_gradients_are_the_same_compiled_and_checkpointed(way):
    torch.compiler.reset()
    model = causal(balance_weight=1.0, z_weight=0.1).train()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    results = []
    for function in (model, torch.compile(model, backend="aot_eager")):
        if function is not model and way == "checkpointed":
            function = model
            model.activation_checkpointing_enable()
        model.zero_grad()
        loss = function(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(each.grad.clone() for each in model.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


def test_a_call_that_fails_leaves_nothing_recording():
    model = causal()
    model.train()
    with pytest.raises(IndexError):
        model(input_ids=IDS + 1000, labels=IDS)
    routers = [each for each in model.modules() if isinstance(each, nn.Router)]
    assert all(each._recorders == () for each in routers)
    assert model(input_ids=IDS, labels=IDS).loss > 0


def test_models_without_a_loss_and_with_pictures_are_left_alone():
    model = hf.upcycle(make("vit"), hf.MPOEConfig(**PLAIN)).train()
    assert model(**inputs("vit")).last_hidden_state.requires_grad
    assert isinstance(model, transformers.ViTModel)
    assert isinstance(model(**inputs("vit"), return_dict=False), tuple)


def test_bad_weights_are_named():
    with pytest.raises(tn.InputError, match=r"balance_weight must be in \[0, inf\), got -1"):
        hf.MPOEConfig(balance_weight=-1)
