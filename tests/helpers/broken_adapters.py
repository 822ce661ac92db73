"""Adapters with one mistake each, named after it; what is said of each stands in test_contract.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from toys import BernoulliImage, GaussianImage, LinearGaussian, ToyConv

from ebm_prior.model.backbone import Gaussian, LatentGroup, PosteriorDraw


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


class OfStd(LinearGaussian):
    """A prior std that is no number to divide by, of the group `broken`."""

    value, broken = 0.0, 1

    def top_down(self, draw: Any, batch_size: int) -> Tensor:
        def wrong(index: int, prior: Gaussian, context: Any) -> Tensor:
            std = torch.full_like(prior.std, self.value) if index == self.broken else prior.std
            return draw(index, Gaussian(prior.mean, std), context)

        return super().top_down(wrong, batch_size)


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


class NamesOtherLatents(LinearGaussian):
    def encode(self, images: Tensor, noise: Sequence[Tensor]) -> PosteriorDraw:
        draw = super().encode(images, noise)
        draw.z = list(noise)
        return draw


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


class ShapeOfFlags(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.groups = (LatentGroup("z2", (True,)), LatentGroup("z1", (3,)))


class GroupsInAList(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.groups = list(self.groups)  # type: ignore[assignment]


class ImageShapeInAList(LinearGaussian):
    def __init__(self) -> None:
        super().__init__()
        self.image_shape = list(self.image_shape)  # type: ignore[assignment]
