"""Graphs: replayed steps are the steps. Where there is no GPU, a replay is played by the function itself."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from played_graphs import Played
from torch import Tensor

from ebm_prior.compute import cuda_graphs
from ebm_prior.compute.cuda_graphs import Graph, Graphs
from ebm_prior.compute.randomness import BlockGenerator, derived_generator, standard_normal, uniform
from ebm_prior.model.drawing import draw
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.model.prior import EBMPrior
from ebm_prior.model.samplers import GraphedPotential, Kernel, SamplerConfig, langevin_step, pcn_langevin_step
from ebm_prior.storage.checkpoint import load_backbone

KERNELS = (langevin_step, pcn_langevin_step, partial(pcn_langevin_step, leapfrogs=3))


def quartic(eps: Sequence[Tensor]) -> Tensor:
    return torch.stack([-0.1 * e.pow(4).flatten(1).sum(1) for e in eps]).sum(0)


def chain(potential: Any, config: SamplerConfig, seed: int, n: int = 5) -> list[Tensor]:
    generator = BlockGenerator(seed, 0, n)

    def propose() -> list[Tensor]:
        return [
            standard_normal((n, *s), generator, dtype=torch.float64, device=torch.device("cpu")) for s in ((3,), (2, 2))
        ]

    with torch.no_grad():
        return draw(potential, propose, config, generator).eps


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(proposals=4, steps=7, step_size=0.3, adapt_steps=3),
        SamplerConfig(proposals=1, steps=5, step_size=0.3, leapfrogs=3),
        SamplerConfig(proposals=1, steps=5, step_size=0.01, kernel="langevin", temperature=0.5),
    ],
)
def test_replayed_chains_are_the_chains(played: None, config: SamplerConfig) -> None:
    potential = GraphedPotential(quartic)
    for seed, n in ((0, 5), (1, 5), (2, 3)):
        plain, replayed = chain(quartic, config, seed, n), chain(potential, config, seed, n)
        assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))
    assert Played.recorded >= 3, "start once for 5 chains, a step for 5 and 3, values where there are proposals"


def test_results_outlive_the_next_replay(played: None) -> None:
    graphs, found = Graphs(), []
    for k in range(4):
        found.append(graphs.run("double", lambda x, _: {"twice": 2 * x}, torch.tensor([float(k)]))["twice"])
    assert torch.cat(found).tolist() == [0, 2, 4, 6]
    assert Played.recorded == 1


def test_names_and_shapes_have_graphs_of_their_own(played: None) -> None:
    graphs, x = Graphs(), torch.ones(2)
    for _ in range(2):
        assert graphs.run("sum", lambda x, _: x.sum(), x) == 2
        assert graphs.run("sum", lambda x, _: x.sum(), torch.ones(3)) == 3
        assert graphs.run("mean", lambda x, _: x.mean(), x) == 1
    assert Played.recorded == 3


def test_kernels_with_other_settings_are_other_graphs(played: None) -> None:
    potential, generator = GraphedPotential(quartic), derived_generator(0)
    state = potential.start([torch.ones(2, 3)])
    kernel: Kernel
    for kernel in KERNELS:
        for _ in range(2):
            twin = partial(kernel) if kernel is langevin_step else kernel  # another object with the same settings
            potential.steps(twin)(state, quartic, torch.full((2,), 0.1), generator)
    assert Played.recorded == 3


def test_noise_is_fresh_at_every_replay(played: None) -> None:
    graphs, generator, twin = Graphs(), derived_generator(3), derived_generator(3)

    def noise(like: Tensor, source: Any) -> list[Tensor]:
        kind = {"dtype": like.dtype, "device": like.device}
        return [
            standard_normal((4,), source, **kind),
            uniform((2,), source, **kind),
            standard_normal((1,), source, **kind),
        ]

    like = torch.ones(1)
    for _ in range(4):
        for replayed, drawn in zip(graphs.run("noise", noise, like, generator), noise(like, twin), strict=True):
            assert torch.equal(replayed, drawn)


def test_kinds_of_inputs_have_graphs_of_their_own(played: None) -> None:
    graphs = Graphs()
    for dtype in (torch.float32, torch.float64) * 2:
        assert graphs.run("double", lambda x, _: 2 * x, torch.ones(2, dtype=dtype)).dtype == dtype
    assert Played.recorded == 2


def test_a_first_call_that_fails_is_not_met(played: None) -> None:
    graphs, generator, failures = Graphs(), derived_generator(0), [True]

    def noise(like: Tensor, source: Any) -> Tensor:
        first = standard_normal((2,), source, dtype=like.dtype, device=like.device)
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("once")
        return first + standard_normal((2,), source, dtype=like.dtype, device=like.device)

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("noise", noise, torch.ones(1), generator)
    for _ in range(3):
        twin = torch.Generator().set_state(generator.get_state())
        assert torch.equal(graphs.run("noise", noise, torch.ones(1), generator), noise(torch.ones(1), twin))
    assert Played.recorded == 1


def test_a_value_to_be_differentiated_is_no_replay(played: None) -> None:
    potential, eps = GraphedPotential(quartic), [torch.ones(2, 3, requires_grad=True)]
    for _ in range(3):
        (gradient,) = torch.autograd.grad(potential(eps).sum(), eps)
        assert torch.allclose(gradient, torch.full((2, 3), -0.4))
    assert Played.recorded == 0


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    large = weakref.WeakSet[Tensor]()

    def refuse(*_: Any) -> Graph:
        memory = torch.ones(9)
        large.add(memory)
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    monkeypatch.setattr(cuda_graphs, "Graph", refuse)
    monkeypatch.setattr(cuda_graphs, "Place", lambda device: None)

    def watched(eps: Sequence[Tensor]) -> Tensor:
        assert not large, "what the recording held is free again before anything else runs"
        return quartic(eps)

    potential, config = GraphedPotential(watched), SamplerConfig(proposals=1, steps=4, step_size=0.2)
    with pytest.warns(UserWarning, match="without CUDA graphs, slower: called a synchronizing CUDA operation$"):
        found = chain(potential, config, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, chain(quartic, config, 0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(chain(potential, config, 1), chain(quartic, config, 1), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["hvae_fashion_mnist", "biva_fashion_mnist", "nvae_cifar10"])
@pytest.mark.parametrize("leapfrogs", [1, 3])
def test_on_a_gpu_graphs_change_rounding_alone(
    name: str, leapfrogs: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    backbone = load_backbone(None, name, device=torch.device("cuda"))
    energy = JointEnergy(backbone.groups, EnergyConfig()).cuda()
    with torch.no_grad():
        for head in energy.heads.values():
            torch.nn.init.normal_(head.last.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    prior = EBMPrior(backbone, energy)
    sampler = SamplerConfig(proposals=4, steps=5, step_size=0.05, leapfrogs=leapfrogs)
    record, recorded = Graph.__init__, list[str]()

    def noted(self: Graph, *given: Any) -> None:
        record(self, *given)
        recorded.append("a graph")

    monkeypatch.setattr(Graph, "__init__", noted)
    replayed = prior.sample(150, seed=1, sampler=sampler, chunk=64)
    assert not [w for w in recwarn if "CUDA graphs" in str(w.message)]
    assert len(recorded) >= 2, "values and a step, of 64 chains"
    monkeypatch.setattr(Graphs, "run", lambda self, name, function, inputs, generator=None: function(inputs, generator))
    plain = prior.sample(150, seed=1, sampler=sampler, chunk=64)
    close = (replayed.images - plain.images).abs().flatten(1).amax(1) < 1e-3
    assert close.float().mean() > 0.97  # a proposal near even odds may fall the other way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_weights_are_followed_and_a_waiting_potential_is_left_as_it_is() -> None:
    device = torch.device("cuda")
    weight, eps = torch.ones(1, device=device), [torch.ones(2, 3, device=device)]
    potential = GraphedPotential(lambda e: weight * e[0].flatten(1).sum(1))
    for value in (1.0, 2.0, -3.0):
        weight.fill_(value)
        state = potential.start(eps)
        assert torch.allclose(state.gradient[0], torch.full((2, 3), value, device=device))
    waiting = GraphedPotential(lambda e: e[0].flatten(1).sum(1) * float(weight.item()))
    stream = torch.cuda.current_stream()
    assert torch.allclose(waiting.start(eps).value, torch.full((2,), -9.0, device=device))
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        assert torch.allclose(waiting.start(eps).value, torch.full((2,), -9.0, device=device))
    assert torch.cuda.current_stream() == stream
    torch.nn.functional.dropout(torch.ones(9, device=device), 0.2)  # the global generator is in order
