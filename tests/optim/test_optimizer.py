"""Our AdamW and SGD are torch's, can be skipped on the device, and continue from their state; what is in bf16 is rounded stochastically."""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from paraxis.base.device import CPU, Device
from paraxis.base.layout import Box, whole_box
from paraxis.optim.build import Optimizer, build_optimizer
from paraxis.optim.config import OptimConfig

CONFIGS = {
    "adamw": OptimConfig(weight_decay=0.1),
    "sgd": OptimConfig(name="sgd", weight_decay=0.1),
    "momentum": OptimConfig(name="sgd", momentum=0.9, weight_decay=0.1),
}
BF16_STATE = OptimConfig(state="bf16", weight_decay=0.1)
RATES = (1e-2, 5e-3, 2e-2, 1e-2)
each_of_torchs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_optimizer = pytest.mark.parametrize("config", [*CONFIGS.values(), BF16_STATE], ids=[*CONFIGS, "bf16 state"])


@pytest.fixture
def device() -> Device:
    return CPU


def some_parameters(device: Device, dtype=torch.float32) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    shapes = {"q.weight": (7, 5), "norm.weight": (5,), "empty.weight": (0, 5), "up.weight": (33, 5), "down.weight": (821, 5)}
    values = {name: torch.randn(shape, generator=random, dtype=dtype).to(device.torch) for name, shape in shapes.items()}
    values["turned.weight"] = torch.randn(9, 5, generator=random, dtype=dtype).to(device.torch).t()
    return {name: nn.Parameter(value) for name, value in values.items()}


def give_gradients(parameters: dict[str, nn.Parameter], step: int, value: float | None = None) -> None:
    random = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        grad = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
        parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(grad if value is None else torch.full_like(grad, value))


def built(parameters: dict[str, nn.Parameter], config: OptimConfig, device: Device) -> Optimizer:
    shapes = {name: (7, *parameter.shape[1:]) for name, parameter in parameters.items()}
    return build_optimizer(parameters, shapes, whole(parameters), config, device, seed=0)


def whole(parameters: dict[str, nn.Parameter]) -> dict[str, Box]:
    return {name: whole_box(tuple(parameter.shape)) for name, parameter in parameters.items()}


def torchs(parameters: dict[str, nn.Parameter], config: OptimConfig, **how: bool) -> torch.optim.Optimizer:
    norm = [parameter for name, parameter in parameters.items() if "norm" in name]
    rest = [parameter for name, parameter in parameters.items() if "norm" not in name]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": norm, "weight_decay": 0.0}]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, **how)
    return torch.optim.SGD(groups, momentum=config.momentum, **how)


def everything(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, torch.Tensor]:
    tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for state, named in optimizer.state().items():
        tensors |= {f"{state}/{name}": tensor.clone() for name, tensor in named.items()}
    return tensors | {name: torch.tensor(value) for name, value in optimizer.counters().items()}


def assert_bitwise(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_steps_are_torchs(device: Device, config: OptimConfig, dtype: torch.dtype, tolerance: float, **how: bool) -> None:
    ours, theirs = some_parameters(device, dtype), some_parameters(device, dtype)
    optimizer, judge = built(ours, config, device), torchs(theirs, config, **how)
    for step, rate in enumerate(RATES):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(rate)
        for group in judge.param_groups:
            group["lr"] = rate
        judge.step()
    for name, parameter in ours.items():
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter, theirs[name], rtol=tolerance, atol=tolerance)
        for state, named in optimizer.state().items():
            if parameter.numel():
                torch.testing.assert_close(named[name], judge.state[theirs[name]][state], rtol=tolerance, atol=tolerance)


@each_of_torchs
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["fp32", "fp64"])
def test_steps_are_those_of_torchs_plain_optimizer(device, config, dtype, tolerance):
    assert_steps_are_torchs(device, config, dtype, tolerance, foreach=False)


def test_steps_of_adamw_round_like_those_of_torchs_fused_optimizer(device):
    assert_steps_are_torchs(device, CONFIGS["adamw"], torch.float32, 3e-7, fused=True)


def test_in_bf16_a_step_is_torchs_in_fp32_rounded_to_one_of_two_neighbours(device):
    ours, theirs = some_parameters(device, torch.bfloat16), some_parameters(device, torch.bfloat16)
    theirs = {name: nn.Parameter(parameter.detach().float()) for name, parameter in theirs.items()}
    optimizer, judge = built(ours, CONFIGS["adamw"], device), torchs(theirs, CONFIGS["adamw"])
    give_gradients(ours, 0)
    for name, parameter in theirs.items():
        parameter.grad = ours[name].grad.float()
    optimizer.step(RATES[0])
    for group in judge.param_groups:
        group["lr"] = RATES[0]
    judge.step()
    for name, parameter in theirs.items():
        if not parameter.numel():
            continue
        for stored, exact in (
            (ours[name].detach(), parameter.detach()),
            (optimizer.state()["exp_avg"][name], judge.state[parameter]["exp_avg"]),
            (optimizer.state()["exp_avg_sq"][name], judge.state[parameter]["exp_avg_sq"]),
        ):
            assert stored.dtype == torch.bfloat16
            assert ((stored.float() - exact).abs() <= (2**-7 + 1e-6) * exact.abs()).all()
            rounded_up = (stored.float().abs() > exact.abs()).double().mean().item()
            above_the_lower_neighbour = (exact.contiguous().view(torch.int32) & 0xFFFF).double().mean().item() / 2**16
            assert rounded_up == pytest.approx(above_the_lower_neighbour, abs=2 * exact.numel() ** -0.5)


def test_updates_too_small_for_bf16_move_weights_all_the_same(device):
    """Each of 64 steps moves a weight of 1 by a sixteenth of the distance to its neighbour below, so that all of them move it by four."""
    parameters = {"norm.weight": nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device.torch))}
    optimizer = build_optimizer(parameters, {"norm.weight": (4096,)}, whole(parameters), CONFIGS["adamw"], device, seed=0)
    for _ in range(64):
        give_gradients(parameters, 0, 1.0)
        optimizer.step(2**-8 / 16)
    assert parameters["norm.weight"].double().mean().item() == pytest.approx(1 - 4 * 2**-8, rel=0, abs=0.1 * 2**-8)
    assert parameters["norm.weight"].unique().numel() > 4


@pytest.mark.parametrize("config", [CONFIGS["adamw"], BF16_STATE], ids=["bf16 weights", "bf16 state"])
def test_a_rank_rounds_its_part_as_one_process_rounds_the_whole(device, config):
    dtype = torch.bfloat16 if config.state == "as_weights" else torch.float32
    shape = (6, 8, 10)
    random = torch.Generator().manual_seed(0)
    value, *grads = (torch.randn(shape, generator=random).to(device.torch, dtype) for _ in range(4))
    found = []
    for box in (
        Box((0, 0, 0), shape),
        Box((2, 0, 0), (2, 8, 10)),
        Box((0, 4, 0), (6, 4, 10)),
        Box((1, 2, 3), (2, 3, 4)),
        Box((0, 0, 5), (6, 8, 5)),
    ):
        part = box.slices_within(Box((0, 0, 0), shape))
        parameters = {"up.weight": nn.Parameter(value[part].clone(memory_format=torch.contiguous_format))}
        optimizer = build_optimizer(parameters, {"up.weight": shape}, {"up.weight": box}, config, device, seed=3)
        for grad in grads:
            parameters["up.weight"].grad = grad[part].clone()
            optimizer.step(1e-2)
        found.append((part, everything(parameters, optimizer)))
    (_, undivided), *parts = found
    for part, held in parts:
        assert_bitwise(held, {name: tensor[part] if tensor.ndim else tensor for name, tensor in undivided.items()})


@every_optimizer
def test_scaled_gradients_step_bitwise_like_those_multiplied_before(device, config):
    results = []
    for before in (False, True):
        parameters = some_parameters(device)
        optimizer = built(parameters, config, device)
        for step in range(3):
            give_gradients(parameters, step)
            scale = torch.tensor(0.3 + step, dtype=torch.float64, device=device.torch)
            if before:
                for parameter in parameters.values():
                    parameter.grad.mul_(scale)
            optimizer.step(1e-2, scale=None if before else scale)
        results.append(everything(parameters, optimizer))
    assert_bitwise(*results)


@every_optimizer
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_skipped_step_leaves_everything_bitwise_as_it_was(device, config, value):
    parameters = some_parameters(device)
    optimizer = built(parameters, config, device)
    for step in range(2):
        give_gradients(parameters, step)
        optimizer.step(1e-2, found_inf=torch.zeros((), device=device.torch))
    before = everything(parameters, optimizer)
    give_gradients(parameters, 2, value)
    optimizer.step(1e-2, found_inf=torch.ones((), device=device.torch))
    assert_bitwise(everything(parameters, optimizer), before)
    assert optimizer.counters() == {"updates": 2.0}


@every_optimizer
def test_training_after_a_skipped_step_is_bitwise_training_without_it(device, config):
    results = []
    for skip in (False, True):
        parameters = some_parameters(device)
        optimizer = built(parameters, config, device)
        for step in range(4):
            if skip and step == 2:
                give_gradients(parameters, step, float("nan"))
                optimizer.step(1e-2, found_inf=torch.ones((), device=device.torch))
            give_gradients(parameters, step)
            optimizer.step(1e-2, found_inf=torch.zeros((), device=device.torch) if skip else None)
        results.append(everything(parameters, optimizer))
    assert_bitwise(*results)


@every_optimizer
def test_an_optimizer_with_loaded_state_continues_bitwise(device, config):
    parameters = some_parameters(device)
    optimizer = built(parameters, config, device)
    for step in range(2):
        give_gradients(parameters, step)
        optimizer.step(1e-2)
    saved = everything(parameters, optimizer)
    resumed_parameters = {name: nn.Parameter(saved[name].clone()) for name in parameters}
    resumed = built(resumed_parameters, config, device)
    for state, named in resumed.state().items():
        for name, tensor in named.items():
            tensor.copy_(saved[f"{state}/{name}"])
    resumed.load_counters(optimizer.counters())
    for step in range(2, 4):
        for each, their in ((parameters, optimizer), (resumed_parameters, resumed)):
            give_gradients(each, step)
            their.step(1e-2)
    assert_bitwise(everything(resumed_parameters, resumed), everything(parameters, optimizer))


def test_state_is_complete_before_the_first_step_and_lists_empty_parameters(device):
    parameters = some_parameters(device)
    state = built(parameters, CONFIGS["adamw"], device).state()
    assert {name: set(tensors) for name, tensors in state.items()} == {"exp_avg": set(parameters), "exp_avg_sq": set(parameters)}
    assert state["exp_avg"]["empty.weight"].shape == (0, 5)
    assert built(parameters, CONFIGS["sgd"], device).state() == {}


def test_a_rank_that_stores_nothing_counts_updates_like_the_others(device):
    parameters = {"norm.weight": nn.Parameter(torch.empty(0, device=device.torch))}
    optimizer = built(parameters, CONFIGS["adamw"], device)
    give_gradients(parameters, 0)
    optimizer.step(1e-2)
    optimizer.step(1e-2, found_inf=torch.ones((), device=device.torch))
    assert optimizer.counters() == {"updates": 1.0}


def test_parameters_of_two_dtypes_are_stepped_side_by_side(device):
    parameters = {
        "low.weight": nn.Parameter(torch.ones(4, 4, device=device.torch)),
        "high.weight": nn.Parameter(torch.ones(4, 4, dtype=torch.float64, device=device.torch)),
    }
    optimizer = built(parameters, CONFIGS["adamw"], device)
    give_gradients(parameters, 0, 1.0)
    optimizer.step(1e-2)
    torch.testing.assert_close(parameters["low.weight"].double(), parameters["high.weight"], rtol=1e-6, atol=1e-6)
    assert (parameters["high.weight"] < 1).all()


def hold_of_adamw_at_once(device: Device, tolerance: float) -> None:
    """The claims above where one kernel does all of AdamW, and that it leaves gradients as they are, wherever they lie."""
    config = CONFIGS["adamw"]
    test_steps_are_those_of_torchs_plain_optimizer(device, config, torch.float32, 1e-6)
    assert_steps_are_torchs(device, config, torch.float32, tolerance, fused=True)
    test_in_bf16_a_step_is_torchs_in_fp32_rounded_to_one_of_two_neighbours(device)
    test_updates_too_small_for_bf16_move_weights_all_the_same(device)
    for each in (config, BF16_STATE):
        test_a_rank_rounds_its_part_as_one_process_rounds_the_whole(device, each)
        test_scaled_gradients_step_bitwise_like_those_multiplied_before(device, each)
        for value in (None, float("nan"), float("inf")):
            test_a_skipped_step_leaves_everything_bitwise_as_it_was(device, each, value)
        test_training_after_a_skipped_step_is_bitwise_training_without_it(device, each)
        test_an_optimizer_with_loaded_state_continues_bitwise(device, each)
    assert_bits_are_the_cpus(device)
    test_a_rank_that_stores_nothing_counts_updates_like_the_others(device)
    test_parameters_of_two_dtypes_are_stepped_side_by_side(device)
    assert_steps_follow_the_cpus(device, config)
    assert_gradients_are_only_read(device, config)


def assert_steps_follow_the_cpus(device: Device, config: OptimConfig) -> None:
    results = []
    for on in (device, CPU):
        parameters = some_parameters(on)
        optimizer = built(parameters, config, on)
        for step, rate in enumerate(RATES):
            give_gradients(parameters, step)
            found_inf = torch.full((), float(step == 1), device=on.torch)
            optimizer.step(rate, found_inf, scale=torch.tensor(0.7, dtype=torch.float64, device=on.torch))
        results.append({name: tensor.cpu() for name, tensor in everything(parameters, optimizer).items()})
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def assert_bits_are_the_cpus(device: Device) -> None:
    """A number in the middle between two neighbours is rounded up by one bit: the same one on every device."""
    results = []
    for on in (device, CPU):
        value = torch.full((3, 4099), 1 + 2**-8, device=on.torch)
        parameters = {"up.weight": nn.Parameter(value)}
        box = Box((2**31, 5), (3, 4099))  # beyond 2^32 entries
        optimizer = build_optimizer(parameters, {"up.weight": (2**31 + 3, 5000)}, {"up.weight": box}, BF16_STATE, on, seed=0)
        for tensors in optimizer.state().values():
            tensors["up.weight"].fill_(1 + 2**-7)
        parameters["up.weight"].grad = torch.full_like(value, 1 + 2**-8)
        optimizer.step(0.0)
        results.append({name: tensor.cpu() for name, tensor in everything(parameters, optimizer).items()})
    assert_bitwise(*results)
    assert all(results[0][f"{state}/up.weight"].unique().numel() == 2 for state in ("exp_avg", "exp_avg_sq"))


def assert_gradients_are_only_read(device: Device, config: OptimConfig) -> None:
    results = []
    for turned in (False, True):
        parameters = {name: parameter for name, parameter in some_parameters(device).items() if name != "turned.weight"}
        optimizer = built(parameters, config, device)
        give_gradients(parameters, 0)
        for parameter in parameters.values():
            parameter.grad = parameter.grad.t().contiguous().t() if turned else parameter.grad
        before = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        optimizer.step(1e-2, scale=torch.tensor(0.3, device=device.torch))
        assert_bitwise({name: parameter.grad for name, parameter in parameters.items()}, before)
        results.append(everything(parameters, optimizer))
    assert_bitwise(*results)


@dataclass(frozen=True)
class Interpreted(Device):
    """A GPU as far as choices go, whose tensors are the host's: Triton's interpreter runs kernels on them."""

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")


def hold_in_tritons_interpreter() -> None:
    """It rounds between a product and a sum, where a GPU does not."""
    hold_of_adamw_at_once(Interpreted("cuda", 0, "", 0), 2e-6)


def run_alone(claims: str, **variables: str) -> None:
    code = f"from tests.optim.test_optimizer import {claims}; {claims}()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ | variables, check=True, timeout=300)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, whose interpreter runs the kernel")
def test_adamw_at_once_holds_in_tritons_interpreter():
    run_alone("hold_in_tritons_interpreter", TRITON_INTERPRET="1")


def hold_on_cuda() -> None:
    """The claims above, and that no step waits for the device."""
    device = Device("cuda", 0, "", 0)
    hold_of_adamw_at_once(device, 3e-7)
    for config in CONFIGS.values():
        test_steps_are_those_of_torchs_plain_optimizer(device, config, torch.float32, 1e-6)
        test_steps_are_those_of_torchs_plain_optimizer(device, config, torch.float64, 1e-14)
        test_scaled_gradients_step_bitwise_like_those_multiplied_before(device, config)
        test_a_skipped_step_leaves_everything_bitwise_as_it_was(device, config, float("nan"))
        test_training_after_a_skipped_step_is_bitwise_training_without_it(device, config)
        test_an_optimizer_with_loaded_state_continues_bitwise(device, config)
        parameters = some_parameters(device)
        optimizer = built(parameters, config, device)
        give_gradients(parameters, 0)
        found_inf, scale = (torch.ones((), device=device.torch) for _ in range(2))
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step(1e-2, found_inf, scale)
        optimizer.step(1e-2)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_all_of_this_holds_on_cuda():
    run_alone("hold_on_cuda")
