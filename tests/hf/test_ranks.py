"""Folders of models that are spread over ranks."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import tnmoe as tn
from tests.nn.ranks import on_ranks
from tnmoe.nn.parallel import shard_experts

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("tnmoe.hf")

IDS = torch.arange(12).view(2, 6)
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def gpt2():
    config = transformers.GPT2Config(vocab_size=32, n_layer=2, n_embd=16, n_head=2)
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "layout": "hidden"}
    return hf.upcycle(
        transformers.GPT2LMHeadModel(config), hf.MPOEConfig(expert_noise=0.1, **settings)
    )


def llama():
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=True
    )
    settings = hf.MPOEConfig(num_experts=4, layout="residual", expert_noise=0.1, every=2)
    return hf.upcycle(transformers.LlamaForCausalLM(config), settings)


def mixtral():
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=32, num_key_value_heads=2, num_local_experts=4
    )
    batches = [{"input_ids": torch.arange(16).view(2, 8)}] * 2
    return hf.compress(
        transformers.MixtralForCausalLM(config),
        hf.CompressionConfig(keep=0.7, layout="hidden"),
        batches,
    )


MODELS = {"gpt2": gpt2, "llama": llama, "mixtral": mixtral}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
    return folder


def load_and_save(rank, folder):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    found = {}
    for name in MODELS:
        for sharded in (False, True):
            loading = hf.prepare_load(folder / name)
            owned = set(shard_experts(loading.model, mesh))
            if sharded:
                fully_shard(loading.model, ignored_params=owned)
            model = loading.run()
            kept = sum(
                (each.to_local() if isinstance(each, DTensor) else each).numel()
                for each in model.parameters()
            )
            with torch.no_grad():
                logits = model(IDS).logits
            hf.save_spread(model, folder / f"{name}-{sharded}")
            try:
                model.save_pretrained(folder / f"{name}-{sharded}-by-one")
            except tn.InputError as error:
                found[name, sharded] = logits, kept, str(error)
    return found


def load_by_transformers(rank, folder):
    """Load models as transformers divides them between ranks; return logits or a message."""
    from transformers.distributed import DistributedConfig

    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    found = {}
    for name in ("llama", "mixtral"):
        for what, sizes in DIVIDED.items():
            try:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder / name, distributed_config=DistributedConfig(**sizes)
                )
            except ValueError as error:
                found[name, what] = str(error)
                continue
            with torch.no_grad():
                logits = model(IDS).logits
            found[name, what] = logits.full_tensor() if isinstance(logits, DTensor) else logits
    return found


DIVIDED = {
    "tensor": {"tp_size": 2},
    "data": {"fsdp_size": 2},
    "expert": {"tp_size": 2, "ep_size": 2},
}


def save_where_nothing_can_be(rank, folder):
    """Return what every rank says of a target that is a file."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    loading = hf.prepare_load(folder / "gpt2")
    shard_experts(loading.model, mesh)
    model = loading.run()
    target = folder / "gpt2" / "config.json" / "below"
    try:
        hf.save_spread(model, target)
    except tn.InputError as error:
        return str(error)
    return None


def load_in_both_ways(rank, folder):
    refused = save_where_nothing_can_be(rank, folder)
    return load_and_save(rank, folder), load_by_transformers(rank, folder), refused


@pytest.fixture(scope="module")
def both(folder):
    return on_ranks(2, partial(load_in_both_ways, folder=folder))


@pytest.fixture(scope="module")
def ranks(both):
    return [found for found, *_ in both]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tensor", "data"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_transformers_divides_what_is_not_an_expert(both, folder, name, how):
    with torch.no_grad():
        expected = hf.from_pretrained(folder / name).eval()(IDS).logits
    for _, found, _ in both:
        torch.testing.assert_close(found[name, how], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_transformers_has_no_plan_to_spread_converted_experts(both, name):
    for _, found, _ in both:
        assert "no `ep_plan`" in found[name, "expert"]


CASES = [(name, sharded) for name in MODELS for sharded in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sharded"), CASES)
def test_every_rank_reads_its_parts_and_computes_the_same(ranks, folder, name, sharded):
    model = hf.from_pretrained(folder / name).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    whole = sum(each.numel() for each in model.parameters())
    for found in ranks:
        logits, kept, _ = found[name, sharded]
        torch.testing.assert_close(logits, expected)
        assert kept < (0.6 if sharded else 0.95) * whole


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sharded"), CASES)
def test_a_saved_folder_is_that_of_one_process(ranks, folder, name, sharded):
    saved = load_file(folder / f"{name}-{sharded}" / "model.safetensors")
    original = load_file(folder / name / "model.safetensors")
    assert saved.keys() >= original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)
    model, expected = (hf.from_pretrained(folder / n) for n in (f"{name}-{sharded}", name))
    assert model.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sharded"), CASES)
def test_one_rank_alone_cannot_save_and_writes_nothing(ranks, folder, name, sharded):
    for found in ranks:
        assert "call tnmoe.hf.save_spread on every rank" in found[name, sharded][2]
    assert not (folder / f"{name}-{sharded}-by-one").exists()


@pytest.mark.slow
def test_every_rank_hears_that_the_first_one_could_not_save(both):
    messages = [message for *_, message in both]
    assert messages[0] == messages[1]
    assert "the first rank could not save the model" in messages[0]
    assert "below" in messages[0]


def test_a_loading_gives_its_numbers_once(folder):
    loading = hf.prepare_load(folder / "gpt2")
    assert all(each.is_meta for each in loading.model.parameters())
    model = loading.run()
    expected = hf.from_pretrained(folder / "gpt2").state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(tn.InputError, match="has run already"):
        loading.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.0.mlp.experts.up.aux_0"), "lacks 1 of the"),
        (lambda t: t.update({"transformer.h.0.mlp.experts.up.aux_9": torch.ones(1)}), "describe"),
        (lambda t: t.update({"transformer.wpe.weight": torch.ones(3, 3)}), "is of shape"),
    ],
    ids=["a missing tensor", "another core", "another size"],
)
def test_a_folder_that_does_not_fit_is_refused_before_anything_is_made(
    folder, tmp_path, change, message
):
    for file in Path(folder / "gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(tn.InputError, match=message):
        hf.prepare_load(tmp_path)


def test_a_folder_that_changes_before_it_is_read_is_refused(folder, tmp_path):
    for file in Path(folder / "gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    loading = hf.prepare_load(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: each + 1 for name, each in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(tn.InputError, match="has changed since it was first read"):
        loading.run()
    assert all(each.is_meta for each in loading.model.parameters())


def test_a_file_in_the_place_of_the_folder_stays(tmp_path):
    target = tmp_path / "file"
    target.write_text("kept")
    with pytest.raises(tn.InputError, match="file is a file, not a folder"):
        hf.save_spread(gpt2(), target)
    assert target.read_text() == "kept"


def test_what_is_no_model_of_transformers_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="model must be a model of transformers"):
        hf.save_spread(torch.nn.Linear(2, 2), tmp_path)
