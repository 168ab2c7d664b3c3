"""Functions that find shared cores also find them in a model under FSDP."""

import copy

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.nn.ranks import on_two_ranks
from tnmoe import InputError, nn

POLICIES = {
    "the model": None,
    "layers": {nn.MPOMoE},
    "experts": {nn.MPOExperts},
    "projections": {nn.MPOProjection},
}
CHANGES = ("nothing", "scale", "mask", "autograd mask", "frozen", "groups")


def make():
    torch.manual_seed(0)
    experts = nn.MPOExperts(4, 8, 16, sites=3, gated=True, bias=True, activation="gelu")
    return torch.nn.Sequential(nn.MPOMoE(nn.TopKRouter(8, 4, top_k=2), experts))


def inputs(rank):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(rank))


def wrap(policy, original):
    chosen = POLICIES[policy] and ModuleWrapPolicy(POLICIES[policy])
    return FullyShardedDataParallel(
        make(), use_orig_params=original, auto_wrap_policy=chosen, device_id=torch.device("cpu")
    )


def train(model, change, losses):
    """Make two steps with a change to the updates of shared cores."""
    if change == "frozen":
        nn.freeze_shared(model)
    groups = nn.parameter_groups(model, 0.1, 0.5) if change == "groups" else model.parameters()
    optimizer = torch.optim.SGD(groups, 0.1)
    hooks = {
        "scale": lambda: [nn.SharedGradientScale(model, 0.5)],
        "mask": lambda: [nn.GradientMask(optimizer, model, 1.0)],
    }.get(change, list)()
    mask = nn.AutogradMask(model, 1.0) if change == "autograd mask" else None
    for _ in range(2):
        optimizer.zero_grad()
        if mask is None:
            losses(model).backward()
            optimizer.step()
            continue
        with mask.next_step():
            losses(model).backward()
            optimizer.step()
    for hook in hooks:
        hook.remove()


def loss_of_both_ranks(model):
    return sum(model(inputs(rank)).square().sum() for rank in (0, 1)) / 2


@pytest.fixture(scope="module")
def ranks():
    """The results of two processes, started once: starting them takes longer than their work."""
    return on_two_ranks(results_of)


def results_of(rank):
    return {
        "exchanged": messages_about_exchanged_parameters(rank),
        "trained": {policy: trained(rank, policy) for policy in POLICIES},
        "flat": {policy: messages_about_flat_parameters(rank, policy) for policy in POLICIES},
        "many": {policy: inference(policy) for policy in POLICIES},
    }


def trained(rank, policy):
    """Parameters after training with every change, by name."""
    found = {}
    for change in CHANGES:
        model = wrap(policy, original=True)
        train(model, change, lambda model: model(inputs(rank)).square().sum())
        with FullyShardedDataParallel.summon_full_params(model):
            found[change] = {
                name.replace("_fsdp_wrapped_module.", ""): each.detach().clone()
                for name, each in model.named_parameters()
            }
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_shared_cores_get_what_they_get_in_one_process(policy, ranks):
    for change in CHANGES:
        model = make()
        train(model, change, loss_of_both_ranks)
        for name, expected in model.named_parameters():
            for found in ranks:
                mine = found["trained"][policy][change][name]
                torch.testing.assert_close(mine, expected, msg=f"{change}: {name}")


def messages_about_flat_parameters(rank, policy):
    """Return the errors of every function for parameters that are parts of larger ones."""
    model = wrap(policy, original=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(inputs(rank)).sum().backward()
    messages = []
    for call in (
        lambda: nn.GradientMask(optimizer, model, 0.5),
        lambda: nn.AutogradMask(model, 0.5),
        lambda: nn.SharedGradientScale(model),
        lambda: nn.parameter_groups(model, 0.1),
        lambda: nn.freeze_shared(model),
        lambda: nn.train_auxiliary(model),
        lambda: nn.shared_parameters(model),
    ):
        with pytest.raises(InputError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("policy", POLICIES)
def test_a_core_inside_a_flat_parameter_is_refused_with_what_to_do(policy, ranks):
    for found in ranks:
        messages = found["flat"][policy]
        assert len(messages) == 7
        for message in messages:
            assert "use_orig_params=True, or fully_shard" in message


def messages_about_exchanged_parameters(rank):
    """Return the errors of masks and ties after ``fully_shard`` exchanged the parameters."""
    messages = []
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask = nn.GradientMask(optimizer, model, 0.5)
    other = nn.AutogradMask(model, 0.5)
    fully_shard(model)
    for call in (
        lambda: other.next_step().__enter__(),
        lambda: nn.GradientMask(optimizer, model, 0.5),
        lambda: nn.tie_layers([model[0], model[0]]),
    ):
        with pytest.raises(InputError) as caught:
            call()
        messages.append(str(caught.value))
    # As accelerate does it.
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with pytest.raises(InputError) as caught:
        optimizer.step()
    mask.remove()
    for original in (False, True):
        wrapped = wrap("experts", original)
        with pytest.raises(InputError, match="tie them before that"):
            nn.tie_layers(
                [each for each in wrapped.modules() if isinstance(each, nn.MPOExperts)] * 2
            )
    return [*messages, str(caught.value)]


def test_masks_notice_that_their_tensors_were_exchanged(ranks):
    for found in ranks:
        exchanged, foreign, tied, stepped = found["exchanged"]
        assert exchanged.startswith("the model no longer has 3 of the 3 tensors to mask")
        assert foreign.startswith("the optimizer does not hold 3 of the 3 tensors to mask")
        assert "tie them before that" in tied
        assert stepped.startswith("the optimizer does not hold 3 of the 3 tensors to mask")


def inference(policy):
    """Run many tokens through a model whose cores are shards between their uses."""
    model = wrap(policy, original=True)
    many = torch.randn(1 << 18, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return (model(many) - make()(many)).abs().max().item(), str(model)


@pytest.mark.parametrize("policy", POLICIES)
def test_many_tokens_are_planned_for_while_cores_are_shards(policy, ranks):
    for found in ranks:
        difference, printed = found["many"][policy]
        assert difference < 1e-5
        assert "bond_dims=(4, 4)" in printed


def test_a_copy_of_a_model_is_not_what_its_optimizer_trains():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(
        InputError, match=r"does not hold 3 of the 3 .*from the model that you train"
    ):
        nn.GradientMask(optimizer, copy.deepcopy(model), 0.5)
