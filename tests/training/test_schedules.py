"""Learning-rate schedules and optimizers: closed forms, torch's own schedulers, and what a recipe may say."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from diffzoo.errors import UserError
from diffzoo.factory import create_model
from diffzoo.training.optimizers import FusedAdam, FusedAdamW, TimmOptimizer, network_optimizer, parameter_groups
from diffzoo.training.schedules_lr import WarmupConstant, WarmupCosine, WarmupInverseSqrt, WarmupLinear


def rates(cls: type, steps: int, **options) -> list[float]:
    """The learning rate that each step uses, for a stated one of 2."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, used = cls(optimizer, **options), []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


CASES = [
    (WarmupConstant, {"warmup_steps": 10}),
    (WarmupCosine, {"warmup_steps": 10, "total_steps": 40}),
    (WarmupLinear, {"warmup_steps": 10, "total_steps": 40, "final": 0.1}),
    (WarmupInverseSqrt, {"warmup_steps": 10, "decay_from": 20}),
]


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_warmup_is_linear_and_reaches_the_stated_rate(cls: type, options: dict) -> None:
    assert rates(cls, 10, **options) == pytest.approx([2 * n / 10 for n in range(1, 11)])


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_no_warmup(cls: type, options: dict) -> None:
    assert rates(cls, 1, **(options | {"warmup_steps": 0}))[0] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_state_resumes(cls: type, options: dict) -> None:
    whole = rates(cls, 30, **options)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    first = cls(optimizer, **options)
    for _ in range(17):
        optimizer.step()
        first.step()
    state, rate = first.state_dict(), optimizer.state_dict()
    fresh = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    second = cls(fresh, **options)
    fresh.load_state_dict(rate)
    second.load_state_dict(state)
    assert fresh.param_groups[0]["lr"] == whole[17]
    fresh.step()
    second.step()
    assert fresh.param_groups[0]["lr"] == whole[18]


def test_closed_forms_after_the_warmup() -> None:
    assert rates(WarmupConstant, 50, warmup_steps=10)[10:] == [2.0] * 40
    cosine = rates(WarmupCosine, 50, warmup_steps=10, total_steps=40, final=0.1)
    for step in (11, 25, 40, 50):
        done = min(1, (step - 10) / 30)
        assert cosine[step - 1] == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2))
    assert cosine[24] == pytest.approx(2 * 0.55)  # half way
    linear = rates(WarmupLinear, 50, warmup_steps=10, total_steps=40)
    assert linear[24] == pytest.approx(1)
    assert linear[39:] == [0.0] * 11
    root = rates(WarmupInverseSqrt, 80, warmup_steps=10, decay_from=20)
    assert root[9:20] == [2.0] * 11
    assert root[79] == pytest.approx(1)  # 2 sqrt(20 / 80)


def test_cosine_as_in_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs, used = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40), []
    for _ in range(41):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(WarmupCosine, 40, total_steps=40)
    assert ours == pytest.approx(used[1:], abs=1e-12)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (WarmupConstant, {"warmup_steps": -1}),
        (WarmupCosine, {"total_steps": 10, "warmup_steps": 10}),
        (WarmupLinear, {"total_steps": 10, "final": 2.0}),
        (WarmupInverseSqrt, {"warmup_steps": 10, "decay_from": 5}),
        (WarmupInverseSqrt, {}),
    ],
)
def test_bad_settings(cls: type, options: dict) -> None:
    with pytest.raises(UserError):
        rates(cls, 1, **options)


# -- optimizers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def no_weight_decay(self) -> set[str]:
        return {"gate"}


def test_groups_follow_the_family() -> None:
    net = Net()
    decayed, exempt = parameter_groups(net)
    assert [id(p) for p in exempt["params"]] == [id(net.gate)]
    assert exempt["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(net.linear.weight), id(net.linear.bias)}
    net.gate.requires_grad_(False)
    assert len(parameter_groups(net)) == 1
    net.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        parameter_groups(net)


def test_exempt_parameters_do_not_decay() -> None:
    net = Net()
    before = net.gate.detach().clone(), net.linear.weight.detach().clone()
    optimizer = FusedAdamW(parameter_groups(net), lr=0.1, weight_decay=0.5)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(net.gate, before[0])
    torch.testing.assert_close(net.linear.weight, before[1] * 0.95)


def test_misnamed_exemption() -> None:
    net = Net()
    net.no_weight_decay = lambda: {"gates"}
    with pytest.raises(UserError, match="'gates'"):
        parameter_groups(net)


@pytest.mark.parametrize("make", [FusedAdam, FusedAdamW])
def test_fused_is_the_default_and_the_same(make) -> None:
    """Against torch's single-tensor form."""
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    fused = make(parameter_groups(ours), lr=1e-2)
    assert all(g["fused"] for g in fused.param_groups)
    plain = {FusedAdam: torch.optim.Adam, FusedAdamW: torch.optim.AdamW}[make]
    plain = plain(theirs.parameters(), lr=1e-2, foreach=False, **({"weight_decay": 0.0} if make is FusedAdamW else {}))
    for step in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((ours, fused), (theirs, plain)):
            optimizer.zero_grad()
            (net.linear(x) * net.gate).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.linear.weight, theirs.linear.weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["lion", "muon", "adamw", "Adafactor"])
def test_timm_names(name: str) -> None:
    net = Net()
    optimizer = TimmOptimizer(parameter_groups(net), name, lr=1e-2, weight_decay=0.1)
    assert type(optimizer).__name__.lower().startswith(name.lower())
    assert optimizer.param_groups[-1]["weight_decay"] == 0.0
    before = net.linear.weight.detach().clone()
    net.linear(torch.randn(2, 4)).mul(net.gate).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net.linear.weight, before)


@pytest.mark.filterwarnings("ignore:.*opt_einsum.*")
def test_kron_draws_nothing_from_the_global_generator() -> None:
    optimizer = TimmOptimizer(parameter_groups(Net()), "kron", lr=1e-2)
    assert optimizer.deterministic  # type: ignore[attr-defined]  # what that is for: the slow test below


@pytest.mark.slow  # Kron compiles
@pytest.mark.filterwarnings("ignore:.*opt_einsum.*")
@pytest.mark.parametrize("name", ["lion", "muon", "adamw", "adafactor", "kron"])
def test_timm_optimizers_resume_to_the_bit(name: str) -> None:
    def made() -> tuple[Net, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = Net()
        return net, TimmOptimizer(parameter_groups(net), name, lr=1e-2, weight_decay=0.1)

    def train(net: Net, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            (net.linear(x) * net.gate).square().mean().backward()
            optimizer.step()
        return net.linear.weight.detach()

    net, optimizer = made()
    train(net, optimizer, range(8))
    kept = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    whole = train(net, optimizer, range(8, 16))
    net, optimizer = made()
    net.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    torch.manual_seed(1)  # a new process
    assert torch.equal(train(net, optimizer, range(8, 16)), whole)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lionn", {}, "did you mean 'lion'"),
        ("lion", {"options": {"nesterovv": True}}, "does not take 'nesterovv'"),
        ("adamw", {"options": {"layer_decay": 0.5}}, "does not take 'layer_decay'"),  # timm's factory would swallow it
        ("sgd", {"options": {"betas": [0.9, 0.9]}}, "does not take 'betas'"),
        ("lion", {"fallback_list": ["*"]}, "fallback_list is for Muon"),
        ("muon", {"fallback_list": ["nothing.*"]}, r"no parameter that trains matches 'nothing\.\*'"),
        ("adahessian", {}, "needs second derivatives"),
        ("bnbadam8bit", {}, "does not run here: .* bitsandbytes"),
        ("fusedadam", {}, "does not run here: .* APEX"),
    ],
)
def test_what_timm_would_take_or_break_on_is_refused(name: str, settings: dict, message: str) -> None:
    if "not run here" in message and torch.cuda.is_available():
        pytest.skip("it may run on this machine")
    with pytest.raises(UserError, match=message):
        TimmOptimizer(parameter_groups(Net()), name, lr=1, **settings)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_16_bits_are_warned_of_once(dtype: torch.dtype) -> None:
    """Adam's moments follow the weights' type, and then its fused kernel differs from the plain one."""
    with warnings.catch_warnings(record=True) as said:
        for _ in range(2):
            network_optimizer(FusedAdamW, nn.Linear(8, 8).to(dtype), None, None)
    told = [str(w.message) for w in said if "16 bits" in str(w.message)]
    assert len(told) == (dtype == torch.bfloat16)
    assert all("bf16-mixed" in text for text in told)


def test_muon_leaves_class_tables_and_named_parameters_to_adamw() -> None:
    network = create_model("simple_uvit_xs_32", num_classes=10, width_at={16: 16, 8: 32}, depth_at={8: 1})
    named = next(n for n, p in network.named_parameters() if p.ndim == 2 and n not in network.class_tables())
    optimizer = TimmOptimizer(parameter_groups(network), "muon", lr=1e-2, fallback_list=[named])
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    by_adamw = {n for n, p in network.named_parameters() if "exp_avg" in optimizer.state[p]}
    assert {*network.class_tables(), named} <= by_adamw
    assert all(network.get_parameter(n).ndim < 2 for n in by_adamw - {*network.class_tables(), named})
