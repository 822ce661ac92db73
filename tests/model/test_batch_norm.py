"""Batch-norm re-adjustment: the statistics become those of prior samples, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from listener import Listener
from torch import Tensor, nn
from toys import LinearGaussian

from ebm_prior.errors import ConfigurationError, DivergenceError
from ebm_prior.model.backbone import Draw, Gaussian
from ebm_prior.model.batch_norm import readjust_batch_norm, readjust_to


class Normed(LinearGaussian):
    """z2 passes through a batch norm, and in train mode through a dropout, on its way to z1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, momentum=0.05)
        self.encoders = nn.BatchNorm1d(2)  # nothing on the generative path uses it
        self.dropout = nn.Dropout(0.9)
        self.inputs: list[Tensor] = []

    def top_down(self, draw: Draw, batch_size: int) -> Tensor:
        top = self.b.new_zeros(1, 2)
        z2 = draw(0, Gaussian(top, top + 1), None)
        self.inputs.append(z2)
        h = self.norm(z2)
        assert not self.dropout.training
        return draw(1, Gaussian(h @ self.A.T + self.b, self.log_s.exp()[None]), z2)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}


def test_the_statistics_become_those_of_samples_at_the_temperature() -> None:
    model = Normed()
    before = state(model)
    told = Listener()
    adjust = {"iterations": 200, "batch_size": 64, "temperature": 0.7}
    assert readjust_batch_norm(model, **adjust, progress=told) == ["norm"]  # type: ignore[arg-type]
    assert told.remarks == ["batch norms: 100 of 200 batches"]
    assert changed(model, before) == {f"norm.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    torch.testing.assert_close(model.norm.running_mean, torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(model.norm.running_var, torch.full((2,), 0.49), atol=0.06, rtol=0)
    assert not any(module.training for module in model.modules())


def test_equal_seeds_give_equal_statistics_and_the_global_generator_rests() -> None:
    models = [Normed() for _ in range(3)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        readjust_batch_norm(model, iterations=3, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    first, same, other = (model.norm.running_mean for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_half_precision_is_adjusted_in_float32() -> None:
    model = Normed().half()
    readjust_batch_norm(model, iterations=2)
    assert all(z.dtype == torch.float32 for z in model.inputs)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16, torch.int64}


def test_autocast_does_not_reach_it() -> None:
    plain, cast = Normed(), Normed()
    readjust_batch_norm(plain, iterations=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        readjust_batch_norm(cast, iterations=2)
    assert torch.equal(plain.norm.running_var, cast.norm.running_var)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_taken_back(value: float) -> None:
    model = Normed()
    before = state(model)
    draws = [model.standard_normal(4), model.standard_normal(4)]
    draws[1][0][0, 0] = value
    with pytest.raises(DivergenceError, match="not finite after re-adjustment in norm: nothing was changed"):
        readjust_to(model, draws)
    assert changed(model, before) == set()
    assert not model.training


def test_an_interruption_takes_it_back() -> None:
    model = Normed()
    before = state(model)

    def draws():
        yield model.standard_normal(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        readjust_to(model, draws())
    assert changed(model, before) == set()
    assert not any(module.training for module in model.modules())


def test_there_must_be_something_to_adjust() -> None:
    with pytest.raises(ConfigurationError, match="LinearGaussian has no batch norm on its generative path"):
        readjust_batch_norm(LinearGaussian(), iterations=1)
    for wrong in ({"iterations": 0}, {"batch_size": 1}, {"temperature": 0.0}):
        with pytest.raises(ConfigurationError, match="positive temperature"):
            readjust_batch_norm(Normed(), **wrong)
