"""Muon against torch's, NorMuon against its formulas in float64, and both on shards against one process."""

import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from glalm.train import muon
from glalm.train.muon import NEWTON_SCHULZ, Muon, fit_quintic, orthogonalize, polar_express

# Wide, tall and square, and with rows that neither two nor three processes can share evenly.
SHAPES = [(8, 20), (20, 8), (7, 7), (1, 5), (16, 16)]
# The paper's table, without its factor of safety.
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


def make_parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def draw_gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, parameters: list, steps: int = 3) -> list[torch.Tensor]:
    for seed in range(steps):
        for parameter, gradient in zip(parameters, draw_gradients(seed), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_muon_is_that_of_torch():
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    ours, theirs = make_parameters(), make_parameters()
    found = take_steps(Muon(ours, **options), ours)
    expected = take_steps(torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"), theirs)
    assert all(map(torch.equal, found, expected))


def test_polar_express_has_the_published_coefficients():
    for found, row in zip(polar_express(safety=1), PUBLISHED, strict=True):
        assert found == pytest.approx(row, rel=1e-9)


@pytest.mark.parametrize("lower, upper", [(0.05, 1.0), (0.3, 1.4), (0.99, 1.01)])
def test_the_quintic_is_the_nearest_to_one(lower, upper):
    """Its error has four extrema of one size and alternating signs, which only the best polynomial has (Chebyshev)."""
    a, b, c = fit_quintic(lower, upper)
    x = torch.linspace(lower, upper, 100_001, dtype=torch.float64)
    error = a * x + b * x**3 + c * x**5 - 1
    worst = error.abs().max()
    inner = error[1:-1]
    is_extremum = ((inner - error[:-2]) * (error[2:] - inner) <= 0).nonzero().flatten() + 1
    extrema = error[torch.tensor([0, *is_extremum.tolist(), -1])]
    assert extrema.abs() == pytest.approx(worst.item(), rel=1e-3)
    assert extrema.sign().tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize("coefficients, error", [(NEWTON_SCHULZ, 0.35), (polar_express(), 0.15)])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_singular_values_become_one(coefficients, error, shape):
    """Also small ones: those of the matrix here go down to a hundredth of its norm."""
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.logspace(-1.5, 0, 30)
    found = orthogonalize(u @ values.diag() @ v, coefficients).double()
    assert (torch.linalg.svdvals(found) - 1).abs().max() < error
    assert (u.double().T @ found @ v.double().T - torch.eye(30)).abs().max() < error


def test_two_steps_of_normuon():
    parameter = torch.nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
    expected, momentum, mean_square = parameter.detach().double(), 0.0, 0.0
    optimizer = Muon([parameter], 0.1, 0.2, 0.5, "polar_express", neuron_beta=0.9)
    for seed in range(2):
        parameter.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(1 + seed))
        optimizer.step()
        momentum = 0.5 * momentum + 0.5 * parameter.grad.double()
        u, s, v = torch.linalg.svd(0.5 * parameter.grad + 0.5 * momentum, full_matrices=False)
        s = s / s.norm()
        for a, b, c in polar_express():
            s = a * s + b * s**3 + c * s**5
        update = u @ s.diag() @ v
        mean_square = 0.9 * mean_square + 0.1 * update.square().mean(1, keepdim=True)
        update = update / mean_square.sqrt()
        # Its root mean square is 0.2.
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * 0.2 * update / update.square().mean().sqrt()
    assert (parameter.double() - expected).norm() < 0.05 * 0.1 * 0.2 * math.sqrt(60)  # Products are in bfloat16.


def compare_on_shards(rank: int, folder: str, world: int) -> None:
    """Take steps with whole parameters and with shards, alone and in two groups that hold copies."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    meshes = [(init_device_mesh("cpu", (world,)), [Shard(0)])]
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        meshes.append((mesh, [Replicate(), Shard(0)]))
    for beta in (None, 0.9):
        options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "neuron_beta": beta}
        whole = make_parameters()
        expected = take_steps(Muon(whole, **options), whole)
        for mesh, placements in meshes:
            sharded = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in make_parameters()]
            optimizer = Muon(sharded, **options)
            for seed in range(3):
                for parameter, gradient in zip(sharded, draw_gradients(seed), strict=True):
                    parameter.grad = distribute_tensor(gradient, mesh, placements)
                optimizer.step()
            for found, value in zip(sharded, expected, strict=True):
                gathered = found.detach().full_tensor()
                assert torch.equal(gathered, value) if beta is None else torch.allclose(gathered, value, 1e-6, 1e-6)
            if beta is not None:
                assert optimizer.state[sharded[0]]["mean_square"].placements == sharded[0].placements
    distributed.barrier()  # gloo aborts a process whose peer leaves before it
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_on_shards_it_is_that_of_one_process(tmp_path, world):
    torch.multiprocessing.spawn(compare_on_shards, (str(tmp_path), world), nprocs=world)


@pytest.mark.parametrize("beta", [None, 0.9])
def test_an_update_of_zeros_changes_nothing(beta):
    """As of the matrices before a projection whose weights are zeros."""
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    Muon(parameters, 0.1, 0.0, 0.9, neuron_beta=beta).step()
    assert all(map(torch.equal, parameters, before))


def test_parameters_without_gradients_stay():
    parameters = make_parameters()
    Muon(parameters, 0.1, 0.2, 0.9, neuron_beta=0.9).step()
    assert all(map(torch.equal, parameters, make_parameters()))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"matrices, not a parameter of shape \[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1, 0.2, 0.9)


def test_two_groups_of_the_same_processes_are_one(tmp_path):
    """In a process that trains one model after another, torch gives parameters the mesh of an earlier model."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        meshes = [DeviceMesh.from_group(distributed.new_group([0]), "cpu") for _ in range(2)]
        sharded = []
        for i, parameter in enumerate(make_parameters()):
            sharded.append(torch.nn.Parameter(distribute_tensor(parameter.detach(), meshes[i % 2], [Shard(0)])))
        assert muon.find_shard_group(sharded[0]) != muon.find_shard_group(sharded[1])
        optimizer = Muon(sharded, 0.1, 0.2, 0.9)
        for parameter, gradient in zip(sharded, draw_gradients(0), strict=True):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, [Shard(0)])
        optimizer.step()
        whole = make_parameters()
        expected = take_steps(Muon(whole, 0.1, 0.2, 0.9), whole, steps=1)
        assert all(torch.equal(found.to_local(), value) for found, value in zip(sharded, expected, strict=True))
    finally:
        distributed.destroy_process_group()


def test_columns_are_refused():
    class Sharded:
        placements = (Shard(1),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "DTensor", Sharded)
        with pytest.raises(ValueError, match="sharded by rows"):
            muon.find_shard_group(Sharded())
