"""The contract kit: it passes adapters that keep the contract, and names the mistake of each that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import BernoulliImage, GaussianImage, LinearGaussian, ToyConv

from ebm_prior import Backbone, Gaussian, LatentGroup, PosteriorDraw
from ebm_prior.errors import ConfigurationError, ContractError
from ebm_prior.testing import check_backbone


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
        return PosteriorDraw(lambda index, prior, context: ((z2, z1)[index], log_q[index]))


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


class Detached(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(i, p, c).detach() if i == 0 else draw(i, p, c), batch_size)


class PartlyDetached(ToyConv):
    def top_down(self, draw: Any, batch_size: int) -> Any:
        def half(index: int, prior: Gaussian, context: Any) -> Tensor:
            z = draw(index, prior, context)
            return 0.5 * z + 0.5 * z.detach() if index == 1 else z

        return super().top_down(half, batch_size)


class WithoutGradient(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        with torch.no_grad():
            return super().top_down(draw, batch_size)


class WrongOrder(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.groups = (LatentGroup("z1", (3,)), LatentGroup("z2", (2,)))

    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(1 - i, p, c), batch_size)


class DrawnTwice(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: (draw(i, p, c), draw(i, p, c))[1], batch_size)


class NeverDrawn(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(i, p, c) if i == 0 else p.mean, batch_size)


class Ignored(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(i, p, c) if i else 0 * draw(i, p, c), batch_size)


class LogStd(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(i, Gaussian(p.mean, p.std.log()), c), batch_size)


class PriorWithoutBatchAxis(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(i, Gaussian(p.mean[0], p.std[0]) if i == 0 else p, c), batch_size)


class GlobalNoise(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        z = super().top_down(draw, batch_size)
        return z + 0.01 * torch.randn_like(z)


class ForgottenDropout(ToyConv):
    def top_down(self, draw: Any, batch_size: int) -> Any:
        return super().top_down(lambda i, p, c: nn.functional.dropout(draw(i, p, c)), batch_size)


class OwnNoise(LinearGaussian):
    calls = 0

    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        self.calls += 1
        return super().top_down(lambda i, p, c: draw(i, p, c) * (1 + 0.01 * math.sin(self.calls)), batch_size)


class StateLeftBehind(LinearGaussian):
    shift = 0.0

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        self.shift = 0.1 * images.mean()
        return super().encode(images, noise)

    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(i, Gaussian(p.mean + self.shift, p.std), c), batch_size)


class AnotherPriorWhileEncoding(StateLeftBehind):
    """The tidier sibling: the shift is always the same and is taken back, so only the densities can tell."""

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        return super().encode(torch.ones_like(images), noise)

    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        features = super().top_down(draw, batch_size)
        self.shift = 0.0
        return features


class EncoderState(LinearGaussian):
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        self.seen = images

        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            q = Gaussian(prior.mean + self.seen.flatten(1).mean(1, keepdim=True), prior.std)
            z = q.mean + q.std * noise[index]
            return z, q.log_prob(z)

        return PosteriorDraw(conditional)


class WrongLogQ(ToyConv):
    """log q of the middle group is evaluated with twice the std that the draw was made with."""

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        good = super().encode(images, noise)

        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            z, log_q = good._conditional(index, prior, context)
            return z, log_q - (z[0].numel() * math.log(2) if index == 1 else 0)

        return PosteriorDraw(conditional)


class LogQOfThePrior(ToyConv):
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        good = super().encode(images, noise)

        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            z, _ = good._conditional(index, prior, context)
            return z, prior.log_prob(z)

        return PosteriorDraw(conditional)


class NoiseBottomFirst(LinearGaussian):
    def __init__(self) -> None:
        super().__init__(top=3, bottom=3)
        self.architecture = {}

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        return super().encode(images, noise[::-1])


class PosteriorNoise(LinearGaussian):
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        return super().encode(images, [torch.randn_like(n) for n in noise])


class CountsItsDraws(ToyConv):
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        drawn: list[Tensor] = []

        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            q = Gaussian(prior.mean + len(drawn), prior.std)
            drawn.append(q.mean + q.std * noise[index])
            return drawn[-1], q.log_prob(drawn[-1])

        return PosteriorDraw(conditional)


class CrossedNoise(LinearGaussian):
    """Every group's own block of the Jacobian is the identity, but the blocks beside them are not zero."""

    def __init__(self) -> None:
        super().__init__(top=3, bottom=3)
        self.architecture = {}

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        def conditional(index: int, prior: Gaussian, context: Any) -> tuple[Tensor, Tensor]:
            own, other = noise[index], noise[1 - index]
            return own + 0.5 * other, -0.5 * (own**2 + math.log(2 * math.pi)).sum(1)

        return PosteriorDraw(conditional)


class DetachedPosterior(LinearGaussian):
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        return super().encode(images, [n.detach() for n in noise])


class WrongLogPrior(LinearGaussian):
    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        return super().log_prior(z) + 0.5


class HeadInTopDown(ToyConv):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        h, z = super().top_down(draw, batch_size)
        return self.head(h + self.conv(z))

    def likelihood(self, features: Any) -> BernoulliImage:
        return BernoulliImage(features)


class FunctionalHeadInTopDown(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return 0.5 + super().top_down(draw, batch_size) @ self.W.T

    def likelihood(self, features: Tensor) -> GaussianImage:
        return GaussianImage(features.view(-1, 1, 2, 2), self.sigma)


class CallsLikelihood(LinearGaussian):
    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        z = super().top_down(draw, batch_size)
        self.preview = self.likelihood(z)
        return z


class BatchMean(ToyConv):
    def top_down(self, draw: Any, batch_size: int) -> Any:
        def centred(index: int, prior: Gaussian, context: Any) -> Tensor:
            z = draw(index, prior, context)
            return z - z.mean(0, keepdim=True) if index == 0 else z

        return super().top_down(centred, batch_size)


class BatchStatisticsInEncoder(ToyConv):
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        return super().encode(images - images.mean(0, keepdim=True), noise)


class Clamped(ToyConv):
    def top_down(self, draw: Any, batch_size: int) -> Any:
        return super().top_down(lambda i, p, c: draw(i, p, c).clamp(-5, 5) if i == 0 else draw(i, p, c), batch_size)


class MeanInMinusOneToOne(LinearGaussian):
    def likelihood(self, features: Tensor) -> GaussianImage:
        good = super().likelihood(features)
        return GaussianImage(2 * good.mean - 1, good.std)


class LogProbPerPixel(LinearGaussian):
    def likelihood(self, features: Tensor) -> Any:
        class PerPixel(GaussianImage):
            def log_prob(self, images: Tensor) -> Tensor:
                return images - self.mean

        return PerPixel(*super().likelihood(features))


class SampleIgnoresGenerator(LinearGaussian):
    def likelihood(self, features: Tensor) -> Any:
        class Careless(GaussianImage):
            def sample(self, *, generator: Any = None) -> Tensor:
                return (self.mean + self.std * torch.randn_like(self.mean)).clamp(0, 1)

        return Careless(*super().likelihood(features))


class ObserveIgnoresGenerator(ToyConv):
    def observe(self, images: Tensor, *, generator: Any = None) -> Tensor:
        return torch.bernoulli(images)


class ObserveKnowsOneKindOfGenerator(ToyConv):
    def observe(self, images: Tensor, *, generator: Any = None) -> Tensor:
        return torch.bernoulli(images, generator=generator)


class HardCodedDtype(ToyConv):
    def top_down(self, draw: Any, batch_size: int) -> Any:
        zero = torch.zeros(1, 4, dtype=torch.float32)
        return super().top_down(lambda i, p, c: draw(i, Gaussian(zero, zero + 1) if i == 0 else p, c) + 0, batch_size)

    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        return super().encode(images.float(), noise)


class ComputesInFloat64(ToyConv):
    def likelihood(self, features: Any) -> BernoulliImage:
        return BernoulliImage(super().likelihood(features).logits.double())


class Counter(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.architecture = {}
        self.register_buffer("passes", torch.zeros(()))

    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        self.passes += 1
        return super().top_down(draw, batch_size)


class WrongArchitecture(LinearGaussian):
    def __init__(self, bottom: int = 3) -> None:
        super().__init__(bottom=bottom)
        self.architecture = {"bottom": bottom + 1}


class ArchitectureOfAnotherClass(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.architecture = {"depth": 3}


class ArchitectureNotJSON(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.architecture = {"activation": nn.SiLU()}


class HiddenConstant(LinearGaussian):
    """A value that is neither an argument nor in the state dict: set by hand after construction."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.architecture = {}

    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        return super().top_down(lambda i, p, c: draw(i, Gaussian(p.mean, p.std * self.gain), c), batch_size)


class SameNames(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.groups = (LatentGroup("z", (2,)), LatentGroup("z", (3,)))


class ShapeWithBatchAxis(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.groups = (LatentGroup("z2", (-1, 2)), LatentGroup("z1", (3,)))


BROKEN = [
    (
        Detached,
        r"gradient of z1 with respect to eps of z2 is None while finite differences see \S+: something .* detach",
    ),
    (
        PartlyDetached,
        r"gradient of conv with respect to eps of point is -?[\d.e-]+ while .* part of the prior path is det",
    ),
    (WithoutGradient, r"gradient of z2 with respect to eps of z2 is None"),
    (WrongOrder, r"met group 'z2' before 'z1': draw must be called once per group, in the order of `groups`"),
    (DrawnTwice, r"draws group 'z2' twice"),
    (NeverDrawn, r"ended without drawing 'z1'"),
    (Ignored, r"depend on group 'z2': does top_down use what draw returned"),
    (LogStd, r"prior std of group 'z2' is not positive: is it a log standard deviation"),
    (PriorWithoutBatchAxis, r"prior mean of group 'z2' has shape \(2,\), which does not broadcast to .*\(3, 2\)"),
    (GlobalNoise, r"global random generator: the prior path draws noise of its own"),
    (ForgottenDropout, r"global random generator: the prior path draws noise of its own"),
    (OwnNoise, r"two calls of top_down with the same draws gave different results: the prior path draws noise"),
    (StateLeftBehind, r"after infer, top_down gives other latents for the same ε: encode leaves state behind"),
    (AnotherPriorWhileEncoding, r"log p of group 'z2' in infer is .* while encoding, draw is given another prior"),
    (EncoderState, r"encode keeps its state in the module"),
    (WrongLogQ, r"log q of group 'point' is not the density of its draws.*std were wrong by a factor 2\)"),
    (
        LogQOfThePrior,
        r"log q of group 'conv' is not the density of its draws: infer reports \S+ nats, the noise map giv",
    ),
    (NoiseBottomFirst, r"noise for group 'z2' does not move its draw: noise is indexed in generation order"),
    (PosteriorNoise, r"infer draws from torch's global random generator although the noise is given"),
    (CountsItsDraws, r"draw of group 'point' changes when the other groups are given.*: it must use the index"),
    (CrossedNoise, r"densities do not multiply to the joint density of the draws: two groups' draws use each other's"),
    (DetachedPosterior, r"group 'z2' has a singular Jacobian with respect to its own noise \(detached"),
    (WrongLogPrior, r"log_prior\(z\) is not log p_β"),
    (HeadInTopDown, r"goes on after the last draw \(convolution with conv.weight, convolution with head\.1\.weight"),
    (FunctionalHeadInTopDown, r"goes on after the last draw \(mm with W\)"),
    (CallsLikelihood, r"top_down calls likelihood: the image head must not run on the prior path"),
    (BatchMean, r"depends on the rest of the batch \(.*point on the prior path.*: something mixes samples"),
    (
        BatchStatisticsInEncoder,
        r"depends on the rest of the batch \(.*dense of the posterior.*: something mixes samples",
    ),
    (Clamped, r"beyond 5 std the draws of group 'dense' change nothing: they are clamped"),
    (MeanInMinusOneToOne, r"likelihood.mean lies in \[-?[\d.]+, [\d.]+\], outside \[0, 1\]"),
    (LogProbPerPixel, r"log_prob has shape \(3, 1, 2, 2\), expected \(3,\): sum over pixels"),
    (SampleIgnoresGenerator, r"likelihood.sample ignores its generator"),
    (ObserveIgnoresGenerator, r"observe ignores its generator"),
    (ObserveKnowsOneKindOfGenerator, r"observe takes no BlockGenerator, draw through ebm_prior.randomness"),
    (HardCodedDtype, r"must take dtype and device from a parameter"),
    (ComputesInFloat64, r"likelihood.mean has dtype torch.float64 where the parameters have torch.float32"),
    (Counter, r"passes change the state dict: passes"),
    (WrongArchitecture, r"does not rebuild this network's state dict: .* is \(4, 2\), expected \(3, 2\)"),
    (ArchitectureOfAnotherClass, r"fails to rebuild the network: TypeError.*depth"),
    (ArchitectureNotJSON, r"architecture cannot be written as JSON"),
    (SameNames, r"names of the latent groups are not unique: \['z', 'z'\]"),
    (ShapeWithBatchAxis, r"shape of group 'z2' must be \(D,\) or \(C, H, W\) without a batch axis, found \(-1, 2\)"),
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
    backbone = HiddenConstant().eval()
    check_backbone(backbone)
    backbone.gain = 1.5
    with pytest.raises(ContractError, match="depends on values that are in neither"):
        check_backbone(backbone)


@pytest.mark.parametrize("build", [ToyConv, Counter])
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
    with pytest.raises(ConfigurationError, match=r"at least two of shape \(1, 2, 2\) in \[0, 1\]"):
        check_backbone(backbone, torch.full((5, 1, 2, 2), 255.0))
