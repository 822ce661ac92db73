"""Fast pretraining: the weights are those of a plain loop, with parts, half precision and compiled cells as asked."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_nvae
import tiny_vdvae
import torch
from run_folders import check_an_interruption
from small_pretrainings import SMALL
from torch import Tensor
from torch._dynamo.utils import counters
from toys import ToyConv

from ebm_prior.compute.parallel import Processes
from ebm_prior.compute.randomness import Purpose, derived_generator
from ebm_prior.data.images import ImageSource, from_array
from ebm_prior.errors import ConfigurationError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.passes import Passes
from ebm_prior.runs.pretrain import pretrain_into
from ebm_prior.storage.checkpoint import backbone_record
from ebm_prior.storage.registry import build
from ebm_prior.storage.weights import fingerprint
from ebm_prior.training.pretrain import Pretraining, evaluate_elbo, pretrain
from ebm_prior.training.pretrain_config import PretrainConfig
from ebm_prior.training.steps import batch_indices, scheduled_rate

HALF = Passes(dtype=torch.bfloat16)
KINDS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}
NETWORKS: dict[str, Callable[[], Backbone]] = {
    "toy": lambda: build(ToyConv, {}, seed=0),
    "nvae": lambda: build(tiny_nvae.NVAE, dict(tiny_nvae.tiny().architecture), seed=0),
}


def pictures(backbone: Backbone) -> ImageSource:
    shape = (40, *backbone.image_shape)
    return from_array(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))


def plain_loop(network: Backbone, images: ImageSource, config: PretrainConfig) -> Backbone:
    """Pretraining as one would write it: one tensor after another, and the gradients of parts one after another."""
    network.train()
    with torch.no_grad():
        backward(network, images, config, 0, 0, learn=False)  # the first batch moves batch norms
    average = copy.deepcopy(network).eval()
    optimizer = KINDS[config.optimizer](network.parameters(), lr=1.0, weight_decay=config.weight_decay, foreach=False)
    for t in range(config.iterations):
        for group in optimizer.param_groups:
            group["lr"] = scheduled_rate(config.learning_rate, t, config.iterations, warmup=0, decay=True)
        optimizer.zero_grad()
        before = [buffer.clone() for buffer in network.buffers()]
        changed: list[list[Tensor]] = []
        for part in range(config.parts):
            for buffer, old in zip(network.buffers(), before, strict=True):
                buffer.copy_(old)
            backward(network, images, config, t, part)
            changed.append([buffer.clone() for buffer in network.buffers()])
        for buffer, *after in zip(network.buffers(), *changed, strict=True):
            buffer.copy_(torch.stack(after).to(torch.float64).mean(0) if config.parts > 1 else after[0])
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
        optimizer.step()
        for kept, new in zip(
            [*average.parameters(), *average.buffers()], [*network.parameters(), *network.buffers()], strict=True
        ):
            with torch.no_grad():
                averaged = t + 1 > config.kl_warmup * config.iterations and kept.is_floating_point()
                kept.copy_(kept.lerp(new, 1 - config.ema) if averaged else new)
    return average


def backward(
    network: Backbone, images: ImageSource, config: PretrainConfig, t: int, part: int, *, learn: bool = True
) -> None:
    """Add the gradient of a part of the batch."""
    words = (part + 1,) if config.parts > 1 else ()
    generator = derived_generator(config.seed, Purpose.PRETRAIN_BATCH, t, *words)
    rows = batch_indices(len(images), config.batch_size, t, config.seed).chunk(config.parts)[part]
    x = network.observe(images.batch(rows), generator=generator)
    posterior = network.infer(x, generator=generator)
    if learn:
        kl = (posterior.log_q - posterior.log_p).mean(0).clamp(min=0)
        beta = min(1.0, (t + 1) / (config.kl_warmup * config.iterations))
        log_likelihood = network.likelihood(posterior.features).log_prob(x)
        loss = beta * kl.sum() - log_likelihood.mean()
        (loss / config.parts).backward()  # type: ignore[no-untyped-call]


def weights(backbone: Backbone) -> dict[str, Tensor]:
    """Parameters and running statistics; numbers of batches are averaged, and cut to whole ones, by another rule."""
    return {name: value for name, value in backbone.state_dict().items() if value.is_floating_point()}


@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_loop_gives_the_same_weights_bit_for_bit(name: str, optimizer: Any) -> None:
    config = PretrainConfig(**SMALL, optimizer=optimizer, weight_decay=0.1, gradient_clip=3.0)
    images = pictures(NETWORKS[name]())
    fast, plain = pretrain(NETWORKS[name](), images, config), plain_loop(NETWORKS[name](), images, config)
    assert all(torch.equal(value, weights(plain)[key]) for key, value in weights(fast).items())


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_average_gradients_and_running_statistics(name: str) -> None:
    config = PretrainConfig(**SMALL, parts=4)
    images = pictures(NETWORKS[name]())
    fast, plain = pretrain(NETWORKS[name](), images, config), plain_loop(NETWORKS[name](), images, config)
    for key, value in weights(fast).items():
        torch.testing.assert_close(value, weights(plain)[key], rtol=1e-3, atol=1e-5, msg=key)
    counts = [int(value) for key, value in fast.state_dict().items() if key.endswith("num_batches_tracked")]
    assert max(counts, default=0) <= config.iterations + 1, "a batch counts once, however many its parts"
    assert fingerprint(fast) != fingerprint(pretrain(NETWORKS[name](), images, PretrainConfig(**SMALL)))


def test_the_regularisation_is_counted_once() -> None:
    """Without noise to tell parts apart: a network in eval mode, all of whose images are equal."""
    backbone = NETWORKS["nvae"]()
    images = from_array(np.zeros((8, *backbone.image_shape), np.uint8))
    found = []
    for parts in (1, 4):
        config = PretrainConfig(**SMALL | {"batch_size": 8}, parts=parts, regularization=1e3)
        training = Pretraining(copy.deepcopy(backbone), images, config)
        loss, _ = training._differentiate()
        found.append(float(loss))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
    assert found[0] > 1e3


def test_a_run_in_parts_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Also with cells in bfloat16; which precision it was is in its record, and another one does not resume it."""
    config = PretrainConfig(**SMALL, parts=2)

    def run(out: Path, **how: Any) -> bytes:
        backbone = NETWORKS["nvae"]()
        images = pictures(backbone)
        pretrain_into(out, backbone, images, images.subset(range(8)), config, **{"passes": HALF, **how})
        return (out / "backbone.safetensors").read_bytes()

    check_an_interruption(run, tmp_path, "backbone.safetensors", 5)
    assert backbone_record(tmp_path / "cut" / "backbone.safetensors")["record"]["precision"] == "bf16"
    with pytest.raises(ConfigurationError, match="precision: 'bf16' before, 'float32' now"):
        run(tmp_path / "cut", resume=True, passes=Passes())


@pytest.mark.parametrize("make", [NETWORKS["nvae"], tiny_vdvae.tiny], ids=["nvae", "vdvae"])
def test_cells_in_half_precision_learn_nearly_the_same(make: Callable[[], Backbone]) -> None:
    """Weights, their gradients, latents, likelihood and KL stay in float32, and the network is as before afterwards."""
    torch.manual_seed(0)
    backbone = make()
    images = pictures(backbone)
    config, asked = PretrainConfig(**SMALL), copy.deepcopy(backbone)
    half = pretrain(asked, images, config, passes=HALF)
    full = pretrain(copy.deepcopy(backbone), images, config)
    assert fingerprint(half) != fingerprint(full), "the cells did run in half"
    assert evaluate_elbo(half, images).elbo == pytest.approx(evaluate_elbo(full, images).elbo, rel=0.02)
    training = Pretraining(copy.deepcopy(backbone), images, config, passes=HALF)
    posterior = training.learning.infer(images.batch([0, 1]))
    image = training.learning.likelihood(posterior.features)
    for tensor in (*posterior.z, posterior.log_q, posterior.log_p, image.log_prob(images.batch([0, 1]))):
        assert tensor.dtype == torch.float32
    training.step()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in training.backbone.parameters())
    again = pretrain(copy.deepcopy(backbone), images, config)
    assert fingerprint(again) == fingerprint(full)
    noise = asked.eval().standard_normal(2, generator=torch.Generator().manual_seed(0))
    fresh = copy.deepcopy(backbone).eval()
    fresh.load_state_dict(asked.state_dict())
    assert all(map(torch.equal, asked.reparameterize(noise), fresh.reparameterize(noise)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.long
@pytest.mark.parametrize("passes", [Passes(compiled=True), Passes(dtype=torch.bfloat16, compiled=True)])
def test_compiled_cells_learn_nearly_the_same(passes: Passes) -> None:
    torch.manual_seed(0)
    backbone = tiny_vdvae.tiny(enc_blocks="4", dec_blocks="4x2", custom_width_str="", no_bias_above=4)
    images, config = pictures(backbone), PretrainConfig(**SMALL)
    before = counters["stats"]["unique_graphs"]
    compiled = pretrain(copy.deepcopy(backbone), images, config, passes=passes)
    assert counters["stats"]["unique_graphs"] > before
    plain = pretrain(backbone, images, config)
    close = 1e-4 if passes.dtype == torch.float32 else 0.02
    assert evaluate_elbo(compiled, images).elbo == pytest.approx(evaluate_elbo(plain, images).elbo, rel=close)


def test_what_cannot_be_is_refused(images: ImageSource) -> None:
    config = PretrainConfig(**SMALL)
    nvae = NETWORKS["nvae"]()
    for backbone, passes, message in (
        (ToyConv(), HALF, "ToyConv has no cells that run in"),
        (ToyConv(), Passes(compiled=True), "ToyConv has nothing to compile"),
        (nvae, Passes(checkpointing=True), "leave out --checkpointing"),
        (copy.deepcopy(nvae).double(), HALF, "expected weights in float32, found float64"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            pretrain(backbone, pictures(backbone), config, passes=passes)
    with pytest.raises(ConfigurationError, match="parts must divide the batch of 16, found 3"):
        PretrainConfig(**SMALL, parts=3)
    with pytest.raises(ConfigurationError, match=r"2 processes share the parts of a batch.* found 1"):
        pretrain(ToyConv(), images, config, processes=Processes(0, 2))
