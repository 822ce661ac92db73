"""The user's own energy in place of the built-in heads: any torch module that maps latents to f(z) in nats.

    class MyEnergy(nn.Module):
        def __init__(self, groups, width=64):      # groups: name and shape of every latent group, the top one first
            self.architecture = {"width": width}   # MyEnergy(groups, **architecture) builds the same module again
            …
        def forward(self, inputs):                 # a list of (B, *group.shape), as `EnergyConfig` has them
            return …                               # f, (B,), which is 0 for every input before training

f must be 0 before training (end in `zero_linear`), so that an untrained prior is the backbone's. A prior file names the
class by an entry point in the group `ebm_prior.energies` and holds its `architecture`; a fit in memory needs neither.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebm_prior.errors import ConfigurationError, described
from ebm_prior.model.backbone import LatentGroup
from ebm_prior.model.energy import EnergyConfig, Input, JointEnergy, shapes_seen

TRIED = 3  # number of random inputs on which a module is tried


class OwnEnergy(JointEnergy):
    """f(z) = factor · module(standardised inputs) + offset, in nats, with the `inputs` of the built-in heads.

    Of `config` only the settings of the inputs have an effect: `conditional`, `standardize` and `bound`.
    """

    per_group = False
    factor: Tensor
    offset: Tensor

    def __init__(self, groups: Sequence[LatentGroup], config: EnergyConfig, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.config, self.groups = config, tuple(groups)
        self.names = [group.name for group in groups]
        shapes = shapes_seen(groups, config)
        self.heads = nn.ModuleDict({name: Input(shape, config) for name, shape in zip(self.names, shapes, strict=True)})
        self.joint = None
        self.module = module
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))

    def terms(self, inputs: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """f in nats as a single summand, (B, 1), because the module need not be a sum over groups."""
        seen = [head.standardized(z) for head, z in zip(self._heads(), inputs, strict=True)]
        value: Tensor = self.module(seen)
        return (self.factor * value + self.offset)[:, None]

    @torch.no_grad()
    def add(self, nats: float) -> None:
        """Add a constant to f."""
        self.offset.add_(nats)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply f by a factor."""
        self.factor.mul_(factor)
        self.offset.mul_(factor)


def energy_of(groups: Sequence[LatentGroup], config: EnergyConfig, module: object = None) -> JointEnergy:
    """The built-in heads, or a copy of the user's `module` in their place, which is tried on a few inputs.

    Raises ConfigurationError unless the module has weights and returns f = 0 of shape (B,).
    """
    if module is None:
        return JointEnergy(groups, config)
    if not isinstance(module, nn.Module):
        make = f", {module.__name__}(backbone.groups) makes one" if isinstance(module, type) else ""
        raise ConfigurationError(f"energy: expected a torch module, found {described(module)}{make}")
    if isinstance(module, JointEnergy):
        raise ConfigurationError("energy: the built-in heads are made from the settings: FitConfig(energy=…)")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigurationError(f"energy: expected a module with weights to learn, found none in {described(module)}")
    energy = OwnEnergy(groups, config, copy.deepcopy(module))
    _try(energy)
    return energy


@torch.no_grad()
def _try(energy: OwnEnergy) -> None:
    like, name = next(energy.module.parameters()), type(energy.module).__name__
    generator = torch.Generator(device=like.device).manual_seed(0)
    inputs = [
        torch.randn(TRIED, *shape, generator=generator, dtype=like.dtype, device=like.device)
        for shape in shapes_seen(energy.groups, energy.config)
    ]
    shapes = [tuple(each.shape) for each in inputs]
    training = energy.module.training
    try:
        found = energy.module.eval()(inputs)
    except Exception as error:  # somebody else's module can raise anything
        raise ConfigurationError(
            f"energy: {name} must take a list of one tensor per latent group, here {shapes}; it raised "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        energy.module.train(training)
    if not isinstance(found, Tensor) or found.shape != (TRIED,):
        raise ConfigurationError(
            f"energy: {name} must return f of shape (B,), here ({TRIED},), found {described(found)}: sum over the rest"
        )
    if bool((found != 0).any()):
        raise ConfigurationError(
            f"energy: {name} must return 0 before training, so that an untrained prior is the backbone's; found "
            f"{[round(value, 4) for value in found.tolist()]}: end it in ebm_prior.model.energy.zero_linear, say"
        )
