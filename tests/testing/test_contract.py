"""The contract kit: it passes adapters that keep the contract, and names the mistake of each that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import broken_adapters as bad
import pytest
import torch
from torch import Tensor
from toys import LinearGaussian, ToyConv

from ebm_prior.errors import ConfigurationError, ContractError
from ebm_prior.model.backbone import Backbone, PosteriorDraw
from ebm_prior.testing.contract import check_backbone


class BottomUp(LinearGaussian):
    """Good, though its encoder samples bottom-up: z1 from x, then z2 from z1, with a flow that mixes z1's entries."""

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        def normal(index: int) -> Tensor:
            return -0.5 * (noise[index] ** 2 + math.log(2 * math.pi)).sum(1)

        flow = torch.eye(3, dtype=noise[1].dtype) + 0.3 * self.W[:3]
        z1 = (0.5 * noise[1]).sinh() @ flow.T + images.flatten(1)[:, :3]
        scale = (0.5 * (0.5 * noise[1]).cosh()).log().sum(1) + torch.linalg.slogdet(flow).logabsdet
        z2 = (z1 @ self.A).tanh() + 0.7 * noise[0]
        log_q = [normal(0) - 2 * math.log(0.7), normal(1) - scale]
        return PosteriorDraw.given([z2, z1], log_q)


@pytest.mark.parametrize("build", [LinearGaussian, ToyConv, BottomUp])
def test_good_adapters_pass(build: type[Backbone]) -> None:
    report = check_backbone(build().eval())
    assert len(report.checks) == 17
    assert report.skipped == ()


def test_what_cannot_be_computed_is_reported_and_not_passed() -> None:
    report = check_backbone(LinearGaussian(top=400).eval())
    assert len(report.skipped) == 1
    assert "log q of group 'z2': 400 dimensions" in report.skipped[0]
    assert "log q is the density of the draws" not in report.checks


BROKEN = [
    (
        bad.Detached,
        r"gradient of z1 with respect to eps of z2 is None while finite differences see \S+: something .* detach",
    ),
    (
        bad.PartlyDetached,
        r"gradient of conv with respect to eps of point is -?[\d.e-]+ while .* part of the prior path is det",
    ),
    (bad.WithoutGradient, r"gradient of z2 with respect to eps of z2 is None"),
    (bad.WrongOrder, r"met group 'z2' before 'z1': draw must be called once per group, in the order of `groups`"),
    (bad.DrawnTwice, r"draws group 'z2' twice"),
    (bad.NeverDrawn, r"ended without drawing 'z1'"),
    (bad.Ignored, r"depend on group 'z2': does top_down use what draw returned"),
    (bad.LogStd, r"prior std of group 'z2' is not positive, found 0: is it a log standard deviation"),
    (bad.PriorWithoutBatchAxis, r"prior mean of group 'z2' has shape \(2,\), which does not broadcast to .*\(3, 2\)"),
    (bad.GlobalNoise, r"global random generator: the prior path draws noise of its own"),
    (bad.ForgottenDropout, r"global random generator: the prior path draws noise of its own"),
    (bad.OwnNoise, r"two calls of top_down with the same draws gave different results: the prior path draws noise"),
    (bad.StateLeftBehind, r"after infer, top_down gives other latents for the same ε: encode leaves state behind"),
    (bad.AnotherPriorWhileEncoding, r"log p of group 'z2' in infer is .* while encoding, draw is given another prior"),
    (bad.EncoderState, r"encode keeps its state in the module"),
    (bad.WrongLogQ, r"log q of group 'point' is not the density of its draws.*std were wrong by a factor 2\)"),
    (
        bad.LogQOfThePrior,
        r"log q of group 'conv' is not the density of its draws: infer reports \S+ nats, the noise map giv",
    ),
    (bad.NoiseBottomFirst, r"noise for group 'z2' does not move its draw: noise is indexed in generation order"),
    (bad.PosteriorNoise, r"infer draws from torch's global random generator although the noise is given"),
    (bad.NamesOtherLatents, r"the z that encode's draw names beforehand are not those that it draws"),
    (bad.CountsItsDraws, r"draw of group 'point' changes when the other groups are given.*: it must use the index"),
    (
        bad.CrossedNoise,
        r"densities do not multiply to the joint density of the draws: two groups' draws use each other's",
    ),
    (bad.DetachedPosterior, r"group 'z2' has a singular Jacobian with respect to its own noise \(detached"),
    (bad.WrongLogPrior, r"log_prior\(z\) is not log p_β"),
    (
        bad.HeadInTopDown,
        r"goes on after the last draw \(convolution with conv.weight, convolution with head\.1\.weight",
    ),
    (bad.FunctionalHeadInTopDown, r"goes on after the last draw \(mm with W\)"),
    (bad.CallsLikelihood, r"top_down calls likelihood: the image head must not run on the prior path"),
    (bad.BatchMean, r"depends on the rest of the batch \(.*point on the prior path.*: something mixes samples"),
    (
        bad.BatchStatisticsInEncoder,
        r"depends on the rest of the batch \(.*dense of the posterior.*: something mixes samples",
    ),
    (bad.Clamped, r"beyond 5 std the draws of group 'dense' change nothing: they are clamped"),
    (bad.MeanInMinusOneToOne, r"likelihood.mean lies in \[-?[\d.]+, [\d.]+\], outside \[0, 1\]"),
    (bad.LogProbPerPixel, r"log_prob has shape \(3, 1, 2, 2\), expected \(3,\): sum over pixels"),
    (bad.SampleIgnoresGenerator, r"likelihood.sample ignores its generator"),
    (bad.ObserveIgnoresGenerator, r"observe ignores its generator"),
    (bad.ObserveKnowsOneKindOfGenerator, r"observe takes no BlockGenerator, draw through ebm_prior.compute.randomness"),
    (bad.HardCodedDtype, r"must take dtype and device from a parameter"),
    (bad.ComputesInFloat64, r"likelihood.mean has dtype torch.float64 where the parameters have torch.float32"),
    (bad.Counter, r"passes change the state dict: passes"),
    (bad.WrongArchitecture, r"does not rebuild this network's state dict: .* is \(4, 2\), expected \(3, 2\)"),
    (bad.ArchitectureOfAnotherClass, r"fails to rebuild the network: TypeError.*depth"),
    (bad.ArchitectureNotJSON, r"architecture cannot be written as JSON"),
    (bad.SameNames, r"names of the latent groups are not unique: \['z', 'z'\]"),
    (
        bad.ShapeWithBatchAxis,
        r"shape of group 'z2' must be \(D,\) or \(C, H, W\) without a batch axis, found \(-1, 2\)",
    ),
    (bad.ShapeOfFlags, r"shape of group 'z2' must be \(D,\) or \(C, H, W\) without a batch axis, found \(True,\)"),
    (bad.GroupsInAList, r"groups must be a tuple .*, set on the class or in the constructor; found the list \[Lat"),
    (bad.ImageShapeInAList, r"image_shape must be a tuple \(C, H, W\) of .* constructor; found the list \[1, 2, 2\]"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=[broken.__name__ for broken, _ in BROKEN])
def test_mistakes_are_named(broken: type[Backbone], message: str) -> None:
    with pytest.raises(ContractError, match=message) as error:
        check_backbone(broken().eval())
    assert str(error.value).startswith(f"{broken.__name__} does not keep the backbone contract")
    assert str(error.value).count("\n  - ") <= 4  # one mistake is not buried under its consequences


def test_training_mode_is_the_only_mistake_named_and_comes_back() -> None:
    backbone = ToyConv().eval()
    backbone.head.train()
    with pytest.raises(ContractError, match=r"submodules are in training mode.*: head, head\.0") as error:
        check_backbone(backbone)
    assert str(error.value).count("\n  - ") == 1
    assert backbone.head.training
    assert not backbone.training


def test_a_value_outside_architecture_and_state_dict_is_found() -> None:
    backbone = bad.HiddenConstant().eval()
    check_backbone(backbone)
    backbone.gain = 1.5
    with pytest.raises(ContractError, match="depends on values that are in neither"):
        check_backbone(backbone)


@pytest.mark.parametrize("build", [ToyConv, bad.Counter])
def test_the_backbone_is_put_back_as_it_was(build: type[Backbone]) -> None:
    backbone = build()
    parameters = dict(backbone.named_parameters())
    next(iter(parameters.values())).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.manual_seed(5)
    with pytest.raises(ContractError):
        check_backbone(backbone)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(following, torch.rand(1))
    assert backbone.training
    assert "likelihood" not in vars(backbone)
    for name, parameter in backbone.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is None
    assert all(
        tensor.equal(state[name]) and tensor.dtype == state[name].dtype
        for name, tensor in backbone.state_dict().items()
    )


def test_given_images_are_used_and_judged() -> None:
    backbone = LinearGaussian().eval()
    check_backbone(backbone, torch.full((5, 1, 2, 2), 0.5))
    for wrong, said in (
        (torch.full((5, 1, 2, 2), 255.0), "shape (5, 1, 2, 2) with values from 255 to 255 in image 0"),
        (torch.full((5, 1, 2, 2), math.nan), "shape (5, 1, 2, 2) with NaN or infinite values in image 0"),
        (torch.full((1, 1, 2, 2), 0.5), "found a float32 tensor of shape (1, 1, 2, 2)"),
    ):
        with pytest.raises(ConfigurationError, match=r"at least two of shape \(1, 2, 2\) in \[0, 1\]") as error:
            check_backbone(backbone, wrong)
        assert str(error.value).endswith(said)
