"""Three VAEs as strangers write them from README.md and backbones/README.md: nothing of ebm-prior is known here but
what these pages name."""

from __future__ import annotations

from ebm_prior.backbones.likelihoods import Bernoulli, GaussianPixels, LogisticMixture, binarize
from torch import cat, nn, zeros

from ebm_prior import Backbone, Gaussian, LatentGroup, PosteriorDraw


def gaussian(parameters):
    mean, log_std = parameters.chunk(2, dim=1)
    return Gaussian(mean, log_std.clamp(-5, 3).exp())


class Block(nn.Module):
    """A group of VDVAE's kind: prior and posterior from the residual path, which the latent is added to."""

    def __init__(self, width, channels):
        super().__init__()
        self.prior = nn.Sequential(nn.SiLU(), nn.Conv2d(width, 2 * channels + width, 1))
        self.posterior = nn.Sequential(nn.SiLU(), nn.Conv2d(2 * width, 2 * channels, 1))
        self.project, self.residual = nn.Conv2d(channels, width, 1), nn.Conv2d(width, width, 1)


class DeepVAE(Backbone):
    """Many small groups at growing resolutions along a residual top-down path, as in VDVAE; colour images of 8 × 8."""

    def __init__(self, blocks=((1, 4), (2, 3), (4, 1)), width=6, channels=2, image_shape=(3, 8, 8)):
        super().__init__()
        self.architecture = {
            "blocks": [list(stage) for stage in blocks],
            "width": width,
            "channels": channels,
            "image_shape": list(image_shape),
        }
        self.image_shape = tuple(image_shape)
        sides = [side for side, count in blocks for _ in range(count)]
        self.groups = tuple(LatentGroup(f"z{number}", (channels, s, s)) for number, s in enumerate(sides))
        self.bias = nn.Parameter(zeros(1, width, sides[0], sides[0]))
        self.see = nn.Conv2d(image_shape[0], width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width, channels) for _ in sides)
        self.image = nn.Conv2d(width, 30, 3, padding=1)

    def top_down(self, draw, batch_size):
        h = self.bias.expand(batch_size, -1, -1, -1)
        for index, (block, group) in enumerate(zip(self.blocks, self.groups, strict=True)):
            h = nn.functional.interpolate(h, size=group.shape[1:])
            parameters, change = block.prior(h).tensor_split([2 * group.shape[0]], dim=1)
            h = h + change
            z = draw(index, gaussian(parameters), h)
            if index < len(self.groups) - 1:
                h = h + block.project(z)
                h = h + block.residual(h.relu())
        return h, z

    def encode(self, images, noise):
        seen = self.see(2 * images - 1)

        def conditional(index, prior, h):
            here = nn.functional.adaptive_avg_pool2d(seen, h.shape[2:])
            q = gaussian(self.blocks[index].posterior(cat([h, here], dim=1)))
            z = q.mean + q.std * noise[index]
            return z, q.log_prob(z)

        return PosteriorDraw(conditional)

    def likelihood(self, features):
        h, z = features
        h = h + self.blocks[-1].project(z)
        return LogisticMixture(self.image(nn.functional.interpolate(h, size=self.image_shape[1:])))


class PlainVAE(Backbone):
    """One vector of latents, a linear image head, squared error: the VAE of a first lesson."""

    image_shape, groups = (1, 8, 8), (LatentGroup("z", (6,)),)
    architecture = {}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 12))
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8)))

    def top_down(self, draw, batch_size):
        prior = self.decoder[0].weight.new_zeros(batch_size, 6)
        return draw(0, Gaussian(prior, prior + 1), None)

    def encode(self, images, noise):
        q = gaussian(self.encoder(images))
        z = q.mean + q.std * noise[0]
        return PosteriorDraw.given([z], [q.log_prob(z)])

    def likelihood(self, features):
        return GaussianPixels(self.decoder(features), std=0.2, clip=True)


class BottomUpVAE(Backbone):
    """Two layers whose encoder draws z1 from the image and z2 from z1, before the generator runs."""

    image_shape = (1, 8, 8)

    def __init__(self, top=4, bottom=8, width=24):
        super().__init__()
        self.architecture = {"top": top, "bottom": bottom, "width": width}
        self.groups = (LatentGroup("z2", (top,)), LatentGroup("z1", (bottom,)))
        self.q1 = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 2 * bottom))
        self.q2 = nn.Sequential(nn.Linear(bottom, width), nn.Tanh(), nn.Linear(width, 2 * top))
        self.p1 = nn.Sequential(nn.Linear(top, width), nn.Tanh(), nn.Linear(width, 2 * bottom))
        self.px = nn.Sequential(nn.Linear(bottom, width), nn.Tanh(), nn.Linear(width, 64), nn.Unflatten(1, (1, 8, 8)))

    def top_down(self, draw, batch_size):
        prior = next(self.parameters()).new_zeros(batch_size, self.groups[0].shape[0])
        z2 = draw(0, Gaussian(prior, prior + 1), None)
        return draw(1, gaussian(self.p1(z2)), None)

    def encode(self, images, noise):
        q1 = gaussian(self.q1(images))
        z1 = q1.mean + q1.std * noise[1]
        q2 = gaussian(self.q2(z1))
        z2 = q2.mean + q2.std * noise[0]
        return PosteriorDraw.given([z2, z1], [q2.log_prob(z2), q1.log_prob(z1)])

    def likelihood(self, features):
        return Bernoulli(self.px(features))

    def observe(self, images, *, generator=None):
        return binarize(images, generator=generator)
