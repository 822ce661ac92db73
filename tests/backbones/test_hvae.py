"""HVAE against arrays of the official code, its file format, and its training from scratch."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ebm_prior.backbones.hvae import HVAE
from ebm_prior.backbones.hvae_network import GaussianHead
from ebm_prior.backbones.layers import Dense, ResidualBlock, SameConv2d, SameConvTranspose2d
from ebm_prior.backbones.likelihoods import Bernoulli, LogisticMixture, binarize, dequantize

from ebm_prior.errors import CheckpointError, ConfigurationError
from ebm_prior.testing import check_backbone

FIXTURES = Path(__file__).resolve().parents[2] / "../shared/fixtures/hvae"
REFERENCES = ["fashion-mini", "cifar-mini", "fashion-trained"]
INPUTS = ("x", "groups", "posterior_draw_order", "prior/eps/", "post/noise/", "grad/w/")


def tiny(**changes):
    """Two stages, unequal block counts, a latent map below a latent vector."""
    stages = [
        {"blocks": [{"filters": 4, "kernel": 3, "stride": 2}], "latent": {"features": 2, "kernel": 3}},
        {
            "blocks": [{"filters": 4, "kernel": 3, "gated": True}, {"filters": 4, "kernel": 3, "stride": 2}],
            "latent": {"features": 3},
        },
    ]
    return HVAE(**{"image_shape": [1, 8, 8], "likelihood": "bernoulli", "stages": stages, **changes})


def tiny_record():
    """`tiny()` as the official code records it; every option that has an official default is left out."""
    block = {"block": "ResBlockConv2d", "out_channels": 4, "kernel_size": 3, "weightnorm": True}
    return {
        "input_shape": torch.Size([1, 8, 8]),
        "likelihood_module": "BernoulliLikelihoodConv2d",
        "config_deterministic": [
            [{**block, "stride": 2, "gated": False}],
            [dict(block), {**block, "stride": 2, "gated": False}],
        ],
        "config_stochastic": [
            {"block": "GaussianConv2d", "latent_features": 2},
            {"block": "GaussianDense", "latent_features": 3, "weightnorm": True},
        ],
        "activation": "ReLU",
        "padded_shape": None,
    }


def initialised(model, batch=16):
    """Show the network one batch in train mode."""
    images = torch.rand(batch, *model.image_shape, generator=torch.Generator().manual_seed(1))
    model.train()
    model.likelihood(model.infer(model.observe(images)).features)
    return model.eval()


def write_run(folder, *, record=None, name="VAE", state=None):
    torch.manual_seed(0)
    state = initialised(tiny()).network.state_dict() if state is None else state
    torch.save(name, folder / "model_class_name.pt")
    torch.save({"kwargs": record or tiny_record()}, folder / "model_kwargs.pt")
    torch.save(state, folder / "model_state_dict.pt")
    return folder


def negative_elbo(model, images, **options):
    posterior = model.infer(images, **options)
    return -(model.likelihood(posterior.features).log_prob(images) + (posterior.log_p - posterior.log_q).sum(1)).mean()


# The official code's numbers


def official_scores(model, x, noise, k):
    """L^{>k} as hvae-oodd computes it: below and at k, means of q on the way up and of p on the way down."""
    upper = len(model.groups) - k
    draw = model.encode(x, [xi if i < upper else torch.zeros_like(xi) for i, xi in enumerate(noise)])
    trace = model.trace(lambda i, p, context: draw(i, p, context) if i < upper else p.mean, len(x))
    log_px = model.likelihood(trace.features).log_prob(x)
    return trace, log_px, log_px + (trace.log_prior[:, :upper] - torch.stack(draw.log_q, 1)).sum(1)


def computed_arrays(model, arrays, dtype, monkeypatch):
    """Every array of a reference file, by its name there, from the public passes of the backbone."""
    names = [group.name for group in model.groups]

    def given(prefix):
        return [torch.from_numpy(arrays[prefix + name]).to(dtype) for name in names]

    def parameters(distribution):
        if isinstance(distribution, Bernoulli):
            return distribution.logits
        assert distribution is not None
        return recorded["likelihood.parameter_net"]

    recorded, posteriors, out = {}, [], {}
    for path in [key[len("debug/") :] for key in arrays if key.startswith("debug/")] + ["likelihood.parameter_net"]:
        model.network.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: recorded.update({path: y}))
    original = GaussianHead.posterior
    monkeypatch.setattr(GaussianHead, "posterior", lambda *a: posteriors.append(original(*a)) or posteriors[-1])

    x = torch.from_numpy(arrays["x"]).to(dtype)
    eps = [e.requires_grad_() for e in given("prior/eps/")]
    trace = model.transform(eps)
    distribution = model.likelihood(trace.features)
    out["prior/params"] = parameters(distribution)
    out["prior/log_px"] = distribution.log_prob(x)
    out["grad/loss"] = sum((z * w).sum() for z, w in zip(trace.z, given("grad/w/"), strict=True))
    gradients = torch.autograd.grad(out["grad/loss"], eps)
    for i, name in enumerate(names):
        out[f"prior/mean/{name}"] = trace.priors[i].mean.expand_as(trace.z[i])
        out[f"prior/std/{name}"] = trace.priors[i].std.expand_as(trace.z[i])
        out[f"prior/z/{name}"] = trace.z[i]
        out[f"grad/deps/{name}"] = gradients[i]

    noise = given("post/noise/")
    posterior = model.infer(x, noise=noise)
    priors = model.trace(lambda i, _, __: posterior.z[i], len(x)).priors
    distribution = model.likelihood(posterior.features)
    out["post/params"] = parameters(distribution)
    out["post/log_px"] = distribution.log_prob(x)
    out["post/elbo"] = out["post/log_px"] + (posterior.log_p - posterior.log_q).sum(1)
    out.update({f"debug/{path}": y for path, y in recorded.items() if path != "likelihood.parameter_net"})
    for i, (name, q) in enumerate(zip(names, posteriors[::-1], strict=True)):
        out |= {f"post/q_mean/{name}": q.mean, f"post/q_std/{name}": q.std, f"post/z/{name}": posterior.z[i]}
        out |= {f"post/log_q/{name}": posterior.log_q[:, i], f"post/log_p/{name}": posterior.log_p[:, i]}
        out[f"post/p_mean/{name}"] = priors[i].mean.expand_as(posterior.z[i])
        out[f"post/p_std/{name}"] = priors[i].std.expand_as(posterior.z[i])

    for k in range(len(names)):
        trace, out[f"lk/log_px/{k}"], out[f"lk/value/{k}"] = official_scores(model, x, noise, k)
        out |= {f"lk/z/{k}/{name}": z for name, z in zip(names, trace.z, strict=True)}
    return {name: tensor.detach().numpy() for name, tensor in out.items()}


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference arrays of ../shared are not here")
@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), [(torch.float64, "f64/", 1e-9), (torch.float32, "", 2e-5)])
@pytest.mark.parametrize("name", REFERENCES)
def test_agrees_with_every_array_of_the_official_code(name, dtype, prefix, tolerance, monkeypatch):
    arrays = dict(np.load(FIXTURES / name / "reference.npz"))
    model = HVAE.load_official(FIXTURES / name).to(dtype)
    assert [group.name for group in model.groups] == list(arrays["groups"])
    wanted = {
        key[len(prefix) :]: array
        for key, array in arrays.items()
        if key.startswith(prefix) and (prefix or not key.startswith(("f64/", *INPUTS)))
    }
    computed = computed_arrays(model, arrays, dtype, monkeypatch)
    assert wanted.keys() <= computed.keys()
    for key, array in wanted.items():
        assert computed[key].shape == array.shape, key
        scale = np.abs(array).max() or 1.0
        assert np.abs(computed[key] - array).max() <= tolerance * scale, key


PUBLISHED = {
    "FashionMNIST": ([1, 28, 28], "bernoulli", 64, (2, 2, 1), ((8, 3), (16, None), (8, None)), 2_620_258, 207),
    "CIFAR10": ([3, 32, 32], "logistic_mixture", 256, (2, 2, 2), ((128, 3), (64, 3), (32, None)), 37_013_064, 199),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_have_the_published_size(name):
    image_shape, likelihood, filters, strides, latents, parameters, entries = PUBLISHED[name]
    stages = [
        {
            "blocks": [{"filters": filters, "kernel": kernel, "stride": s} for s in (1, 1, stride)],
            "latent": {"features": features, "kernel": latent_kernel},
        }
        for kernel, stride, (features, latent_kernel) in zip((5, 3, 3), strides, latents, strict=True)
    ]
    with torch.device("meta"):
        model = HVAE(image_shape, likelihood, stages)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.network.state_dict()) == entries


# Its files


def test_the_architecture_survives_json():
    model = initialised(tiny(activation="Swish", q_dropout=0.1, p_dropout=0.2, skips=False)).double()
    again = HVAE(**json.loads(json.dumps(model.architecture))).double().eval()
    again.load_state_dict(model.state_dict())
    assert again.architecture == model.architecture
    assert (again.groups, again.image_shape) == (model.groups, model.image_shape)
    eps = model.standard_normal(3)
    for a, b in zip(model.reparameterize(eps), again.reparameterize(eps), strict=True):
        assert torch.equal(a, b)


def test_an_official_folder_gives_back_the_network(tmp_path):
    loaded = HVAE.load_official(write_run(tmp_path))
    assert loaded.architecture == tiny().architecture  # with the official default of `gated`, True
    assert not loaded.training
    state = torch.load(tmp_path / "model_state_dict.pt")
    assert state.keys() == loaded.network.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.network.state_dict().items())


def test_the_official_default_activation_is_swish(tmp_path):
    record = tiny_record()
    del record["activation"]
    assert HVAE.load_official(write_run(tmp_path, record=record)).architecture["activation"] == "Swish"


def test_unnormed_weights_and_a_learned_prior_have_their_official_names(tmp_path):
    record = tiny_record()
    for config in (
        *record["config_deterministic"][0],
        *record["config_deterministic"][1],
        *record["config_stochastic"],
    ):
        config["weightnorm"] = False
    record["config_stochastic"][1]["learn_prior"] = True
    stages = tiny().architecture["stages"]
    for stage in stages:
        for options in (*stage["blocks"], stage["latent"]):
            options["weight_norm"] = False
    stages[1]["latent"]["learned_prior"] = True
    model = initialised(tiny(stages=stages))
    names = dict(model.network.named_parameters())
    assert "stages.1.stochastic.prior_logits" in names
    assert "stages.0.q_deterministic.layers.0.conv1.conv.weight" in names
    assert "stages.1.stochastic.in_transform_q.linear.weight" in names
    assert "stages.1.p_projection.transform.linear.weight_v" in names  # projections are always normed
    # Unnormed layers keep their flag False for ever, which is not an error.
    loaded = HVAE.load_official(write_run(tmp_path, record=record, state=model.network.state_dict()))
    eps = loaded.standard_normal(2)
    assert torch.equal(loaded.decode(loaded.reparameterize(eps)).mean, model.decode(model.reparameterize(eps)).mean)


class Exploit:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("file", ["model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt"])
def test_a_malicious_file_is_refused_and_does_not_run(tmp_path, file):
    write_run(tmp_path)
    torch.save(Exploit(tmp_path / "run"), tmp_path / file)
    with pytest.raises(CheckpointError, match=r"mkdir, refused because loading it could run code"):
        HVAE.load_official(tmp_path)
    assert not (tmp_path / "run").exists()


def test_other_files_of_the_folder_are_not_opened(tmp_path):
    write_run(tmp_path)
    torch.save(Exploit(tmp_path / "run"), tmp_path / "evaluator.pt")
    (tmp_path / "datamodule_config.pt").write_bytes(b"not a torch file")
    HVAE.load_official(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt"])
def test_missing_and_truncated_files_are_named(tmp_path, file):
    path = write_run(tmp_path) / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{file}, found a damaged file"):
        HVAE.load_official(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file}, found no such file"):
        HVAE.load_official(tmp_path)


def test_a_path_that_is_no_folder_is_told_the_format(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a folder, and the official format of HVAE is a folder with"):
        HVAE.load_official(tmp_path / "absent")


def test_another_model_class_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected the model class VAE.*found 'LVAE'"):
        HVAE.load_official(write_run(tmp_path, name="LVAE"))


def change(path, value):
    def apply(record):
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return apply


BLOCK = ("config_deterministic", 0, 0)
UNSUPPORTED = {
    "likelihood": (change(("likelihood_module",), "BetaLikelihoodConv2d"), "BetaLikelihoodConv2d"),
    "activation with parameters": (change(("activation",), "PSwish"), "PSwish"),
    "padding": (change(("padded_shape",), [1, 32, 32]), "padded_shape"),
    "output channels": (change(("features_out",), 7), "features_out"),
    "downsampling": (change((*BLOCK, "downsampling_mode"), "nearest"), "downsampling_mode"),
    "upsampling": (change((*BLOCK, "upsampling_mode"), "bilinear"), "upsampling_mode"),
    "block": (change((*BLOCK, "block"), "DenseBlock"), "DenseBlock"),
    "latent": (change(("config_stochastic", 1, "block"), "Categorical"), "Categorical"),
    "unknown option": (change((*BLOCK, "dilation"), 2), "dilation"),
    "absurd size": (change((*BLOCK, "kernel_size"), [3, 3]), "kernel_size"),
    "negative size": (change((*BLOCK, "out_channels"), -4), "filters"),
    "no stages": (change(("config_stochastic",), []), "as many stages as latents"),
    "huge": (change((*BLOCK, "out_channels"), 10**6), "first block must have as many filters"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_architectures_are_refused(tmp_path, case):
    apply, message = UNSUPPORTED[case]
    record = tiny_record()
    apply(record)
    with pytest.raises(CheckpointError, match=message):
        HVAE.load_official(write_run(tmp_path, record=record))


def test_every_weight_that_does_not_fit_is_named(tmp_path):
    state = initialised(tiny()).network.state_dict()
    first, second, third = (key for key in list(state) if key.startswith("stages.0.q_deterministic.layers.0.conv1.c"))
    del state[first]
    state[second] = torch.ones(7)
    state[third] = state[third].to(torch.int64)
    state["surprise"] = torch.ones(2)
    with pytest.raises(CheckpointError) as caught:
        HVAE.load_official(write_run(tmp_path, state=state))
    for line in (
        f"missing: {first}",
        f"mis-shaped: {second}",
        f"of another type: {third}",
        "unexpected: surprise (2,)",
    ):
        assert line in str(caught.value)


def test_weights_that_are_not_finite_or_never_met_data_are_refused(tmp_path):
    state = initialised(tiny()).network.state_dict()
    key = "stages.1.stochastic.in_transform_q.initialized"
    with pytest.raises(CheckpointError, match=r"never initialised from data \(stages.1.stochastic.in_transform_q\)"):
        HVAE.load_official(write_run(tmp_path, state={**state, key: torch.tensor(False)}))
    bias = "likelihood.parameter_net.conv.bias"
    with pytest.raises(CheckpointError, match=f"found NaN or infinity in {bias}"):
        HVAE.load_official(write_run(tmp_path, state={**state, bias: torch.tensor([math.nan])}))
    with pytest.raises(CheckpointError, match="something else than a dict of dense tensors"):
        HVAE.load_official(write_run(tmp_path, state=[1, 2]))


def test_shapes_that_cannot_meet_are_refused():
    stages = tiny().architecture["stages"]
    with pytest.raises(ConfigurationError, match="strides divide, found size 7"):
        tiny(image_shape=[1, 7, 7])
    with pytest.raises(ConfigurationError, match="square"):
        tiny(image_shape=[1, 8, 4])
    wide = [stages[0], {**stages[1], "blocks": [{"filters": 5, "kernel": 3}, {"filters": 4, "kernel": 3, "stride": 2}]}]
    with pytest.raises(ConfigurationError, match="as many filters"):
        tiny(stages=wide)
    queue = [{**stages[0], "blocks": [{"filters": 4, "kernel": 3}] * 2 + stages[0]["blocks"]}, stages[1]]
    with pytest.raises(ConfigurationError, match="turn in the queue"):
        tiny(stages=queue)
    with pytest.raises(ConfigurationError, match="expected options among"):
        tiny(stages=[{"blocks": [{"filter": 4}], "latent": {"features": 1}}])


def test_without_skips_no_block_has_an_auxiliary_input():
    def auxiliary_layers(**options):
        early = [{"filters": 4, "kernel": 3, "stride": 2}, {"filters": 4, "kernel": 3}]
        stages = [{"blocks": early, "latent": {"features": 2, "kernel": 3}}] * 2
        model = initialised(tiny(stages=stages, **options))
        return {key.partition(".aux_op")[0] for key in model.network.state_dict() if "aux_op" in key}

    assert auxiliary_layers() == {"stages.1.q_deterministic.layers.1"}
    assert auxiliary_layers(skips=False) == set()


# The contract


@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic_mixture"])
def test_keeps_the_backbone_contract(likelihood):
    torch.manual_seed(0)
    image_shape = [1 if likelihood == "bernoulli" else 3, 8, 8]
    check_backbone(initialised(tiny(image_shape=image_shape, likelihood=likelihood)))


def test_gradients_of_the_reparameterization_reach_every_noise():
    torch.manual_seed(0)
    model = initialised(tiny(activation="Tanh")).double()  # smooth, so that finite differences apply
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    eps = [e.requires_grad_() for e in model.standard_normal(2)]
    assert torch.autograd.gradcheck(lambda *e: tuple(model.reparameterize(e)), eps)
    upper, lower = torch.autograd.grad(model.reparameterize(eps)[1].sum(), eps)
    assert upper.abs().min() > 0
    assert lower.abs().min() > 0


def test_zero_noise_gives_the_posterior_mean():
    torch.manual_seed(0)
    model = initialised(tiny()).double()
    x = model.observe(torch.rand(4, 1, 8, 8, dtype=torch.float64))
    noise = model.standard_normal(4)
    zero = [noise[0], torch.zeros_like(noise[1])]  # z1, the lower group: nothing that it depends on is drawn
    centre = model.infer(x, noise=zero).z[1]
    pair = [model.infer(x, noise=[noise[0], sign * noise[1]]).z[1] for sign in (1, -1)]
    torch.testing.assert_close((pair[0] + pair[1]) / 2, centre)
    assert not torch.allclose(pair[0], centre)


# Training from scratch


def test_a_new_network_sets_itself_up_on_its_first_batch_and_learns():
    torch.manual_seed(0)
    model = tiny().train()
    images = F.interpolate((torch.rand(64, 1, 2, 2) < 0.5).float(), scale_factor=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = negative_elbo(model, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(bool(flag) for key, flag in model.state_dict().items() if key.endswith("initialized"))
    assert losses[-1] < 60 < losses[0]  # 64 fair coins have 44 nats
    assert all(math.isfinite(loss) for loss in losses)


LAYERS = {
    "conv": (SameConv2d(3, 5, 3, 2), (16, 3, 9, 9)),
    "even kernel": (SameConv2d(3, 5, 4), (16, 3, 9, 9)),
    "transposed": (SameConvTranspose2d(3, 5, 2, 2), (16, 3, 9, 9)),  # nothing is cropped
    "dense": (Dense(12, 5), (64, 3, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_batch_in_train_mode_standardises_the_outputs(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = 3 + 2 * torch.randn(shape)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    y = layer.train()(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std(1), torch.ones(5), atol=1e-4, rtol=0)
    after = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(5 * x)
    assert all(torch.equal(value, after[key]) for key, value in layer.state_dict().items())


def test_one_image_is_too_few_to_initialise_from():
    with pytest.raises(ConfigurationError, match="at least 2 images"):
        Dense(4, 2).train()(torch.ones(1, 4))


def test_dropout_acts_in_train_mode_only():
    torch.manual_seed(0)
    model = initialised(tiny(q_dropout=0.5, p_dropout=0.5))
    eps, noise = model.standard_normal(4), model.standard_normal(4)
    x = model.observe(torch.rand(4, 1, 8, 8))
    inference, generation = (lambda: model.infer(x, noise=noise).z[1]), (lambda: model.reparameterize(eps)[1])
    for draw in (inference, generation):
        model.eval()
        assert torch.equal(draw(), draw())
        model.train()
        assert not torch.equal(draw(), draw())


# Layers


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_padding_and_cropping_follow_the_published_rule(kernel, stride):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    conv = SameConv2d(3, 4, kernel, stride).double().eval()
    out = -(-7 // stride)
    total = max(0, (out - 1) * stride + kernel - 7)
    padded = F.pad(x, (total // 2, total - total // 2) * 2)
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.conv(), conv.conv.bias, stride))
    assert conv(x).shape == (2, 4, out, out)

    transposed = SameConvTranspose2d(3, 4, kernel, stride).double().eval()
    with torch.no_grad():
        transposed.conv.bias.normal_()
    full = F.conv_transpose2d(x, transposed.conv(), transposed.conv.bias, stride)
    surplus = kernel - stride
    before, after = surplus // 2, surplus - surplus // 2  # negative: zeros are added
    torch.testing.assert_close(transposed(x), F.pad(full, (-before, -after) * 2))
    assert transposed(x).shape == (2, 4, 7 * stride, 7 * stride)


def block(in_channels, filters, stride=1, *, transposed=False, residual=True, aux_shape=None, size=6):
    options = {"activation": F.relu, "gated": False, "residual": residual, "transposed": transposed}
    return ResidualBlock((in_channels, size, size), filters, 3, stride, aux_shape=aux_shape, **options).double().eval()


@pytest.mark.parametrize(("in_channels", "filters"), [(2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_shortcut_pads_or_cuts_channels_and_pools(in_channels, filters, stride):
    x = torch.randn(2, in_channels, 6, 6, dtype=torch.float64)
    silent = block(in_channels, filters, stride)
    with torch.no_grad():
        silent.conv2.conv.weight_g.zero_()
    kept = min(in_channels, filters)
    expected = torch.zeros(2, filters, 6 // stride, 6 // stride, dtype=torch.float64)
    padded = F.pad(x[:, :kept], (0, 1, 0, 1))  # SAME padding of a 3×3 window with stride 2: one zero, at the end
    expected[:, :kept] = x[:, :kept] if stride == 1 else F.avg_pool2d(padded, 3, 2)
    torch.testing.assert_close(silent(x), expected)


def test_upsampling_and_first_blocks_have_no_shortcut():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for silent in (block(3, 3, 2, transposed=True), block(3, 3, residual=False)):
        with torch.no_grad():
            silent.conv2.conv.weight_g.zero_()
        assert silent(x).abs().max() == 0


def test_an_auxiliary_input_of_the_blocks_own_shape_has_no_effect():
    assert block(3, 3, aux_shape=(3, 6, 6)).aux_op is None
    kinds = {(3, 12, 12): (SameConv2d, 3), (3, 3, 3): (SameConvTranspose2d, 3), (5, 6, 6): (SameConv2d, 1)}
    for aux_shape, (kind, kernel) in kinds.items():
        made = block(3, 3, aux_shape=aux_shape)
        assert type(made.aux_op) is kind
        assert made.aux_op.conv().shape[2:] == (kernel, kernel)
        x, aux = (torch.randn(2, *shape, dtype=torch.float64) for shape in ((3, 6, 6), aux_shape))
        assert not torch.allclose(made(x, aux), made(x, -aux))
        with pytest.raises(ConfigurationError, match="expects an auxiliary input"):
            made(x)


# Likelihoods


def test_bernoulli_probabilities_sum_to_one():
    logits = torch.randn(1, 1, 2, 2, dtype=torch.float64).expand(16, -1, -1, -1)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4).view(16, 1, 2, 2)
    assert Bernoulli(logits).log_prob(images).exp().sum().item() == pytest.approx(1)


def test_mixture_probabilities_sum_to_one():
    # Equal, independent colours: log p of the grey image k is three times log p(k).
    parameters = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    parameters[:, 1:] = torch.tensor([0.7, -1.5, 0.0] * 3, dtype=torch.float64).view(1, 9, 1, 1)
    grey = (torch.arange(256, dtype=torch.float64) / 255).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    log_prob = LogisticMixture(parameters.expand(256, -1, -1, -1)).log_prob(grey)
    assert (log_prob / 3).exp().sum().item() == pytest.approx(1)


def test_mixture_mean_and_density_are_those_of_its_samples():
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(20, dtype=torch.float64, generator=generator)
    parameters[2:].view(3, 3, 2)[:, 0] *= 0.2  # means and scales are small: nothing reaches the ends of the range
    parameters[2:].view(3, 3, 2)[:, 1] = -3.5

    def mixture(values):
        return LogisticMixture(values.view(1, 20, 1, 1).expand(20_000, -1, -1, -1))

    distribution = mixture(parameters)
    samples = distribution.sample(generator=generator)
    assert samples.shape == (20_000, 3, 1, 1)
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - distribution.mean[0]).abs() < 4 * error).all()

    parameters[2:].view(3, 3, 2)[:, 1] -= 0.3  # a narrower density p': under p, p'/p has mean 1
    ratio = (mixture(parameters).log_prob(samples) - distribution.log_prob(samples)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / len(samples) ** 0.5)


def test_mixture_images_lie_in_the_range():
    wild = LogisticMixture(5 * torch.randn(50, 20, 4, 4, generator=torch.Generator().manual_seed(0)))
    for images in (wild.sample(generator=torch.Generator().manual_seed(1)), wild.mean):
        assert 0 <= images.min() < 0.1
        assert 0.9 < images.max() <= 1


def test_observations():
    x = torch.arange(256.0).view(1, 1, 16, 16) / 255
    seeded = torch.Generator().manual_seed
    continuous = dequantize(x, generator=seeded(3))
    assert torch.equal((continuous * 256).floor(), x * 255)
    assert continuous.max() < 1
    many = x.expand(4000, -1, -1, -1)
    binary = binarize(many, generator=seeded(3))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(binary.mean(0), x[0], atol=0.04, rtol=0)
    assert torch.equal(binarize(many, generator=seeded(3)), binary)
    for likelihood, image_shape, expected in (
        ("bernoulli", (1, 8, 8), binarize),
        ("logistic_mixture", (3, 8, 8), dequantize),
    ):
        images = torch.rand(2, *image_shape)
        model = tiny(image_shape=image_shape, likelihood=likelihood)
        assert torch.equal(model.observe(images, generator=seeded(1)), expected(images, generator=seeded(1)))
