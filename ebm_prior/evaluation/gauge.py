"""The classifier test between posterior and prior latents: an AUC per latent group, which measures the prior hole.

The AUC is .5 if the classifier finds no difference between the prior and the aggregate posterior, and 1 if they do not
overlap. It is a lower bound on how well the two can be distinguished, and grows with the number of latents and the size
of the classifier. So the budget is printed with it, and only AUCs at equal budgets can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.compute.parallel import ALONE, Processes
from ebm_prior.compute.randomness import Purpose, derived_generator, derived_seed, seeded
from ebm_prior.errors import DataError, few
from ebm_prior.evaluation.metrics import auroc
from ebm_prior.interfaces import SILENT, Progress
from ebm_prior.model.backbone import LatentGroup
from ebm_prior.model.energy import EnergyConfig, JointEnergy, values
from ebm_prior.settings import (
    require,
    require_kinds,
    require_not_negative,
    require_positive,
    require_seed,
    require_shares,
    setting,
    within,
)
from ebm_prior.training.objectives import nce_loss
from ebm_prior.training.steps import batch_indices, update_average

FINE_TUNING = 0.3  # share of the learning rate when all of the network is trained
FEWEST_PER_FOLD = 20  # latents of each kind


@dataclass(frozen=True)
class GaugeConfig:
    """The classifier and its training. The network is a joint energy, so it sees what a learned prior could correct.

    Only settings with a help text are options of the command line: AUCs compare at equal settings alone.
    """

    energy: EnergyConfig = field(
        default_factory=lambda: EnergyConfig(
            channels=32, hidden=64, vector_layers=2, joint=64, activation="leaky_relu", conditional=False, dropout=0.2
        )
    )  # all sizes stated: a yardstick does not change with the product's defaults
    iterations: int = setting(500, "Largest number of gradient steps for each classifier and fold")
    batch_size: int = setting(
        256, "Posterior latents per gradient step of a classifier, matched by as many prior latents"
    )
    learning_rate: float = 2e-3  # peak; decays to 0 along a cosine
    weight_decay: float = 1e-2  # AdamW's, decoupled
    ema: float = 0.98  # decay of the weights' moving average, which is what is scored
    inner: float = 0.2  # share of a training part that decides when to stop
    evaluate_every: int = 25  # iterations between looks at the inner part
    patience: int = 6  # looks without a better loss before stopping
    folds: int = 2  # parts; each is scored by networks that saw the others
    seed: int = 0

    def __post_init__(self) -> None:
        require_kinds(self)
        require_positive(self, "iterations", "batch_size", "learning_rate", "evaluate_every", "patience")
        require_seed(self)
        with within("energy"):
            alone = "must be off in the gauge, because its classifiers see z alone"
            require(self.energy, "conditional", not self.energy.conditional, alone)
            require(self.energy, "groupwise", not self.energy.groupwise, alone)
        require(self, "folds", self.folds >= 2, "must be 2 or more")
        require(self, "inner", 0 < self.inner < 1, "must be in (0, 1)")
        require_shares(self, "ema", open=True)
        require_not_negative(self, "weight_decay")

    @property
    def least(self) -> int:
        """The smallest number of latents of each kind that can be gauged."""
        return FEWEST_PER_FOLD * self.folds


class GaugeResult(NamedTuple):
    """Held-out AUC of posterior against prior latents."""

    overall: float  # all groups together
    per_group: dict[str, float]  # a network that sees this group alone
    budget: str  # what the numbers depend on, to be printed beside them


def gauge_auc(
    posterior: Sequence[Tensor],
    prior: Sequence[Tensor],
    groups: Sequence[LatentGroup],
    *,
    config: GaugeConfig | None = None,
    device: torch.device | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> GaugeResult:
    """Cross-fitted AUC with which a fresh classifier tells posterior z from prior z, overall and per group.

    posterior, prior: lists of (N, *group.shape) and (M, *group.shape), in generation order. The draws must be
    independent, so one per image. Each part is scored by networks trained on the other parts, with early stopping on an
    inner split; the AUCs of the parts are averaged. A network that finds no difference stays at f = 0, with an AUC of
    exactly .5. `device`: where to train the networks (default: where the latents are); latents are moved there batch by
    batch. progress: advances by `networks` in all. The `processes` share the parts. Raises DataError for other shapes,
    NaN, or fewer latents than `config.least`. The global random state is not changed.
    """
    config = config or GaugeConfig()
    _check(posterior, prior, groups, config)
    device = device or posterior[0].device
    parts = [
        torch.randperm(len(z[0]), generator=derived_generator(config.seed, Purpose.GAUGE_FOLDS + which)).tensor_split(
            config.folds
        )
        for which, z in enumerate((posterior, prior))
    ]
    at_once = min(processes.count, config.folds)

    def scored(fold: int) -> tuple[float, list[float], int]:
        """The AUC of all groups together and of each alone on a part, and the size of the network of all groups."""
        held = [_rows(z, part[fold]) for z, part in zip((posterior, prior), parts, strict=True)]
        train_q, train_p = (
            _rows(z, torch.cat([*part[:fold], *part[fold + 1 :]]))
            for z, part in zip((posterior, prior), parts, strict=True)
        )
        whole, alone = _networks(train_q, train_p, groups, config, device, fold, lambda: progress.advance(at_once))
        areas = [auroc(*(values(network, [z[index]], device) for z in held)) for index, network in enumerate(alone)]
        return auroc(*(values(whole, z, device) for z in held)), areas, sum(p.numel() for p in whole.parameters())

    overall, areas, sizes = zip(*processes.map(scored, range(config.folds)), strict=True)
    budget = (
        f"{len(posterior[0]):,} posterior and {len(prior[0]):,} prior latents, {config.folds} folds, at most "
        f"{config.iterations:,} iterations of {config.batch_size} + {config.batch_size}, "
        f"{sizes[0]:,} parameters"
    )
    per_group = {group.name: _mean(folds) for group, folds in zip(groups, zip(*areas, strict=True), strict=True)}
    return GaugeResult(_mean(overall), per_group, budget)


def networks(groups: int, config: GaugeConfig) -> int:
    """Number of networks that `gauge_auc` trains for latents of `groups` groups."""
    return config.folds * (groups + (groups > 1))


def _networks(
    posterior: list[Tensor],
    prior: list[Tensor],
    groups: Sequence[LatentGroup],
    config: GaugeConfig,
    device: torch.device,
    fold: int,
    trained_one: Callable[[], None],
) -> tuple[JointEnergy, list[JointEnergy]]:
    """A classifier of all groups together, and one for each group alone.

    The one of all groups starts from the heads of the others. Trained from scratch it would overfit a large group
    without signal, and be stopped before it had found the signal of small groups. So its joint head is trained first,
    on the heads' features, and then all of it; both trainings keep the state that is best on the inner split.
    `trained_one` is called after each network.
    """
    with seeded(device, config.seed, Purpose.GAUGE_WEIGHTS, fold):  # initial weights and dropout
        alone = []
        for index, group in enumerate(groups):
            network = JointEnergy([group], config.energy).to(posterior[index].dtype)
            network.standardize(network.moments([posterior[index]]))
            network.to(device)
            alone.append(_train(network, [posterior[index]], [prior[index]], config, device, 1.0, (fold, index)))
            trained_one()
        if len(groups) == 1:
            return alone[0], alone
        whole = JointEnergy(groups, replace(config.energy, own_heads=len(groups))).to(device, posterior[0].dtype)
        for mine, trained in zip(whole.heads.values(), alone, strict=True):
            mine.load_state_dict(next(iter(trained.heads.values())).state_dict())
        whole.heads.requires_grad_(False)
        whole = _train(whole, posterior, prior, config, device, 1.0, (fold, len(groups)))
        whole.requires_grad_(True)
        whole = _train(whole, posterior, prior, config, device, FINE_TUNING, (fold, len(groups) + 1))
        trained_one()
        return whole, alone


def _train(
    network: JointEnergy,
    posterior: list[Tensor],
    prior: list[Tensor],
    config: GaugeConfig,
    device: torch.device,
    rate: float,
    stream: tuple[int, ...],
) -> JointEnergy:
    """Logistic regression of posterior (positive) on prior; returns the moving average at its best inner loss."""
    inner_q, posterior = _split(posterior, config.inner)  # the parts are shuffled
    inner_p, prior = _split(prior, config.inner)
    average = copy.deepcopy(network).eval()
    best, looks = copy.deepcopy(average), 0
    best_loss = _loss(average, inner_q, inner_p, device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate * config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    seeds = [derived_seed(config.seed, Purpose.GAUGE_SUBSETS, which, *stream) for which in range(2)]
    size = min(config.batch_size, len(posterior[0]), len(prior[0]))
    network.train()
    for iteration in range(config.iterations):
        batches = [
            _rows(z, batch_indices(len(z[0]), size, iteration, seed))
            for z, seed in zip((posterior, prior), seeds, strict=True)
        ]
        with torch.enable_grad():
            loss = nce_loss(*network([torch.cat(pair).to(device) for pair in zip(*batches, strict=True)]).chunk(2))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        update_average(average, network, config.ema, iteration)
        if (iteration + 1) % config.evaluate_every == 0 or iteration + 1 == config.iterations:
            inner_loss, looks = _loss(average, inner_q, inner_p, device), looks + 1
            if inner_loss < best_loss:
                best, best_loss, looks = copy.deepcopy(average), inner_loss, 0
            elif looks >= config.patience:
                break
    return best


def _loss(network: JointEnergy, posterior: list[Tensor], prior: list[Tensor], device: torch.device) -> float:
    return float(nce_loss(values(network, posterior, device), values(network, prior, device)))


def _mean(areas: Sequence[float]) -> float:
    return sum(areas) / len(areas)


def _rows(z: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [group[rows] for group in z]


def _split(z: list[Tensor], share: float) -> tuple[list[Tensor], list[Tensor]]:
    first = max(1, round(share * len(z[0])))
    return [group[:first] for group in z], [group[first:] for group in z]


def _check(
    posterior: Sequence[Tensor], prior: Sequence[Tensor], groups: Sequence[LatentGroup], config: GaugeConfig
) -> None:
    for what, z in (("posterior", posterior), ("prior", prior)):
        shapes = [tuple(group.shape) for group in z]
        if [shape[1:] for shape in shapes] != [tuple(g.shape) for g in groups] or len({s[0] for s in shapes}) != 1:
            raise DataError(
                f"{what}: expected one (N, *shape) per group, {[(g.name, g.shape) for g in groups]}; found {shapes}"
            )
        if shapes[0][0] < config.least:
            raise DataError(f"{what}: expected at least {config.least} latents, found {shapes[0][0]}")
        if broken := [g.name for g, t in zip(groups, z, strict=True) if not bool(t.isfinite().all())]:
            raise DataError(f"{what}: latents of {few(broken)} hold NaN or infinity")
