"""A converted model's loss includes those of its routers, and its output shows their logits."""

import contextlib
import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import tnmoe as tn
from tests.hf.families import GENERATORS, IDS, MASK, inputs, make
from tests.nn.replicas import replicate
from tnmoe import hf, nn
from tnmoe.nn.routing.router import call_observers

PLAIN_TUPLE = {"return_dict": False}
MIXTRAL = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 3,
}  # fmt: skip
PLAIN = {"num_experts": 3, "sites": 3, "num_experts_per_tok": 2}


def causal(**settings):
    return hf.upcycle(make("llama"), hf.MPOEConfig(**PLAIN, **settings))


def task_loss(model, **batch):
    """Return the loss without the routers' losses, which evaluation leaves out."""
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
    with nn.record_routing(model):
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
@pytest.mark.slow
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
    assert nothing_records(model)
    assert model(input_ids=IDS, labels=IDS).loss > 0


def test_models_without_a_loss_and_with_pictures_are_left_alone():
    model = hf.upcycle(make("vit"), hf.MPOEConfig(**PLAIN)).train()
    with nn.record_routing(model):
        assert model(**inputs("vit")).last_hidden_state.requires_grad
        assert isinstance(model(**inputs("vit"), return_dict=False), tuple)
    assert isinstance(model, transformers.ViTModel)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("way", ["argument", "configuration", "position"])
def test_a_tuple_holds_what_an_output_with_names_does(name, way):
    torch.manual_seed(0)
    batch = {**inputs(name), "labels": IDS}
    if way == "configuration" and not runs_without_return_dict(make(name), batch):
        pytest.skip("transformers' own model fails")
    model = hf.upcycle(make(name), hf.MPOEConfig(**PLAIN, balance_weight=1.0)).train()
    parameters = list(signature(model.forward).parameters)
    if way == "position" and "return_dict" not in parameters:
        pytest.skip("return_dict has no position")

    def call(**more):
        torch.manual_seed(0)  # there is dropout
        given = batch | more
        if way == "position" and "return_dict" in more:
            names = parameters[: parameters.index("return_dict") + 1]
            positional = [given.pop(each, None) for each in names]
            return model(*positional, **given)
        return model(**given)

    for shows in (False, True):
        expected = call(output_router_logits=shows).to_tuple()
        if way == "configuration":
            model.config.return_dict = False
        got = call(output_router_logits=shows, **{} if way == "configuration" else PLAIN_TUPLE)
        model.config.return_dict = True
        assert isinstance(got, tuple)
        assert len(got) == len(expected)
        torch.testing.assert_close(got[:2], expected[:2])
        if shows:
            torch.testing.assert_close(got[-1], expected[-1])
            assert [each.shape[1] for each in got[-1]] == [3] * len(got[-1])
    with torch.no_grad():
        alone = call(**PLAIN_TUPLE)[0]
        hf.attach_router_losses(model, hf.MPOEConfig(**PLAIN, balance_weight=0.0))
        torch.testing.assert_close(call(**PLAIN_TUPLE)[0], call().loss)
        assert alone - call().loss > 0.5  # a balance loss is hardly below 1


def runs_without_return_dict(model, batch):
    model.config.return_dict = False
    with contextlib.suppress(AttributeError):
        return isinstance(model(**batch), tuple)
    return False


def test_a_loss_without_a_name_is_told_from_what_is_none():
    model = causal(balance_weight=1.0).train()
    with nn.record_routing(model):
        first, *_ = model(input_ids=IDS, return_dict=False)
    assert first.shape == (2, 7, 50)  # logits, as ever


def test_weights_that_are_attached_again_take_the_place_of_the_first():
    model = causal(balance_weight=1.0).train()
    batch = {"input_ids": IDS, "labels": IDS}
    plain = task_loss(model, **batch)
    once = model(**batch).loss - plain
    for weight in (1.0, 3.0):
        hf.attach_router_losses(model, hf.MPOEConfig(**PLAIN, balance_weight=weight))
        torch.testing.assert_close(model(**batch).loss - plain, weight * once)


def test_models_in_a_model_show_their_routers_as_transformers_mixtures_do():
    model = causal()
    whole = model(input_ids=IDS, output_router_logits=True)
    inner = model.base_model(input_ids=IDS, output_router_logits=True)
    torch.testing.assert_close(inner.router_logits, whole.router_logits)
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=50, **MIXTRAL)
    ).eval()  # fmt: skip
    for each in (model, mixtral):
        for part in (each, each.base_model):
            assert len(part(input_ids=IDS, output_router_logits=True).router_logits) == 3
            *_, logits = part(input_ids=IDS, output_router_logits=True, return_dict=False)
            assert [each.shape[1] for each in logits] == [3] * 3
        each.config.output_router_logits = True
        assert len(each(input_ids=IDS, output_router_logits=None).router_logits) == 3
        for part in (each, each.base_model):
            assert len(part(input_ids=IDS).router_logits) == 3
            hidden = part(input_ids=IDS, output_router_logits=False)
            assert hidden.get("router_logits") is None


@pytest.mark.parametrize("make_model", ["ours", "mixtral"])
def test_threads_see_the_logits_of_their_own_calls(make_model):
    torch.manual_seed(0)
    if make_model == "ours":
        model = causal(balance_weight=1.0)
    else:  # the measure of it
        config = transformers.MixtralConfig(vocab_size=50, **MIXTRAL)
        model = transformers.MixtralForCausalLM(config).eval()
    batches = [torch.randint(50, (1, length)) for length in range(3, 11)]

    def call(ids):
        return model(input_ids=ids, output_router_logits=True).router_logits

    expected = [call(ids) for ids in batches]
    barrier = threading.Barrier(len(batches))

    def work(number):
        barrier.wait()
        got = [call(batches[number]) for _ in range(20)]
        return sum(not all(map(same, each, expected[number])) for each in got)

    with ThreadPoolExecutor(len(batches)) as pool:
        assert list(pool.map(work, range(len(batches)))) == [0] * len(batches)


def same(one, other):
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


def test_threads_train_with_the_losses_of_their_own_calls():
    model = causal(balance_weight=1.0).train()
    batches = [torch.randint(50, (1, length)) for length in range(3, 11)]
    expected = [model(input_ids=ids, labels=ids).loss.item() for ids in batches]
    barrier = threading.Barrier(len(batches))

    def work(number):
        barrier.wait()
        ids = batches[number]
        return [model(input_ids=ids, labels=ids, return_dict=False)[0].item() for _ in range(10)]

    with ThreadPoolExecutor(len(batches)) as pool:
        for losses, loss in zip(pool.map(work, range(len(batches))), expected, strict=True):
            assert losses == pytest.approx([loss] * 10, rel=1e-5)


def test_calls_of_replicas_in_threads_have_losses_of_their_own():
    model = causal(balance_weight=1.0).train()
    batch = {"input_ids": IDS, "labels": IDS}
    expected = model(**batch).loss
    with nn.record_routing(model) as routing:
        replicas = [replicate(model) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda replica: replica(**batch), replicas))
    for output in outputs:
        torch.testing.assert_close(output.loss, expected)
    assert len(routing.calls) == 2 * 3


def test_a_call_within_a_call_is_none_of_it():
    model = causal(balance_weight=1.0).train()
    batch = {"input_ids": IDS, "labels": IDS, "output_router_logits": True}
    expected, inner = model(**batch), []
    other = {"input_ids": IDS[:1, :3], "labels": IDS[:1, :3], "output_router_logits": True}
    expected_inner = model(**other)

    def reenter(*_):
        if not inner:
            inner.append(None)
            inner[0] = model(**other)

    handle = model.model.layers[1].register_forward_pre_hook(reenter)
    got = model(**batch)
    handle.remove()
    for one, two in ((got, expected), (inner[0], expected_inner)):
        torch.testing.assert_close(one.loss, two.loss)
        torch.testing.assert_close(one.router_logits, two.router_logits)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_interrupts_a_call_leaves_the_next_one_right(error):
    model = causal(balance_weight=1.0).train()
    batch = {"input_ids": IDS, "labels": IDS, "output_router_logits": True}
    expected = model(**batch)

    def interrupt(*_):
        raise error

    handle = model.model.layers[2].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(error):
            model(**batch)
    handle.remove()
    got = model(**batch)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.router_logits, expected.router_logits)
    assert nothing_records(model)


def nothing_records(model):
    return not any(
        call_observers.values_for(each) for each in model.modules() if isinstance(each, nn.Router)
    )


def test_hooks_of_others_that_fail_first_leave_a_call_around_theirs_alone():
    model = causal(balance_weight=1.0).train()
    batch = {"input_ids": IDS, "labels": IDS}
    expected, failing = model(**batch).loss, []

    def fail(*_):
        if failing:
            raise ValueError

    def reenter(*_):
        failing.append(1)
        with contextlib.suppress(ValueError):
            model(**batch)
        failing.clear()

    model.register_forward_pre_hook(fail, prepend=True)
    model.model.layers[1].register_forward_pre_hook(reenter)
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("more", [{}, {"return_dict": False, "output_router_logits": True}])
@pytest.mark.slow
def test_a_model_compiles_into_one_graph_with_its_losses_and_no_more_than_once(more):
    torch.compiler.reset()
    model = causal(balance_weight=1.0).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = {"input_ids": IDS, "labels": IDS, **more}
    for _ in range(2):
        torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(**batch)[0], model(**batch)[0])
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(compiled, **batch).result()
    torch.testing.assert_close(other[0], model(**batch)[0])
    assert len(other) == len(model(**batch))
    assert nothing_records(model)


@pytest.mark.slow
def test_a_model_in_another_compiled_module_adds_its_losses():
    torch.compiler.reset()
    model = causal(balance_weight=1.0).train()

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return 2 * self.model(ids, labels=ids).loss

    around = Around()
    compiled = torch.compile(around, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(IDS), around(IDS))
    torch.testing.assert_close(around(IDS), 2 * model(input_ids=IDS, labels=IDS).loss)


def test_an_exported_model_computes_the_same():
    model = causal()
    model.config.use_cache = False
    expected = model(input_ids=IDS).logits
    program = torch.export.export(model, (), {"input_ids": IDS})
    torch.testing.assert_close(program.module()(input_ids=IDS).logits, expected)


def test_a_pass_without_a_loss_to_add_to_is_warned_about_once():
    model = causal(balance_weight=1.0).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, labels=IDS)
        model(input_ids=IDS, output_router_logits=True)
        with nn.record_routing(model), torch.enable_grad():
            model(input_ids=IDS)
        with torch.no_grad():
            model(input_ids=IDS)
            model.generate(IDS, max_new_tokens=2, pad_token_id=0, eos_token_id=None)
        causal(balance_weight=0.0).train()(input_ids=IDS)
        frozen = causal().train()
        frozen.requires_grad_(False)
        frozen(input_ids=IDS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(input_ids=IDS)
        model(input_ids=IDS, return_dict=False)
        model.base_model(input_ids=IDS)
    (warning,) = caught
    assert "LlamaForCausalLM returned no loss in training" in str(warning.message)
    assert warning.filename == __file__


def test_bad_weights_are_named():
    with pytest.raises(tn.InputError, match=r"balance_weight must be in \[0, inf\), got -1"):
        hf.MPOEConfig(balance_weight=-1)
