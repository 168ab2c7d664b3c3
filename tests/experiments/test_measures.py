"""Router load and drift, against counting by hand."""

import pytest
import torch
import transformers

from experiments.measures import Drift, router_load
from experiments.methods import METHODS
from experiments.variants import cores_of, mixtures
from tnmoe import hf
from tnmoe.nn import record_routing


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    return METHODS["mpoe"].model(transformers.BertModel(config), num_experts=4)


def test_load_counts_tokens_and_not_padding(bert):
    ids = torch.randint(1, 50, (3, 8))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:], mask[1, 2:] = 0, 0
    with torch.no_grad(), record_routing(bert.eval()) as routing:
        bert(input_ids=ids, attention_mask=mask)
    load = router_load(bert, [{"input_ids": ids, "attention_mask": mask}])
    for shares, call in zip(load["shares"], routing.calls, strict=True):
        chosen = call.index.view(3, 8)[mask.bool()].flatten().tolist()
        assert len(chosen) == 15
        assert shares == [round(chosen.count(expert) / 15, 4) for expert in range(4)]


def test_equal_shares_are_even_and_one_expert_for_all_is_not(bert):
    batch = [{"input_ids": torch.randint(1, 50, (4, 16))}]
    for layer in mixtures(bert):
        torch.nn.init.zeros_(layer.router.weight)
    one = router_load(bert, batch)
    assert one["largest_share"] == 1
    assert one["evenness"] == pytest.approx(0, abs=1e-6)
    assert router_load(hf.average_experts(bert), batch) == {}


def test_drift_is_the_relative_change(bert):
    drift = Drift(bert)
    assert drift.measure(bert) == {"shared": 0.0, "owned": 0.0}
    with torch.no_grad():
        for core in cores_of(bert)["shared"]:
            core.mul_(1.5)
        for core in cores_of(bert)["owned"]:
            core.mul_(0.9)
    assert drift.measure(bert) == pytest.approx({"shared": 0.5, "owned": 0.1}, rel=1e-5)


def test_a_shared_core_is_not_owned_and_none_is_forgotten(bert):
    cores = cores_of(bert)
    names = dict(bert.named_parameters())
    of_mpos = {id(p) for name, p in names.items() if ".experts." in name and "bias" not in name}
    kinds = {kind: {id(core) for core in found} for kind, found in cores.items()}
    assert kinds["shared"] | kinds["owned"] == of_mpos
    assert not kinds["shared"] & kinds["owned"]
    assert len(cores["shared"]) == 2 * 2
