"""What `ebm-prior ood` and `ebm-prior anomaly` do: score sets of images, and say how well that tells them apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ebm_prior.commands import require_writable
from ebm_prior.data import ImageSource, from_array, open_images
from ebm_prior.detection import Detection, detection, interval, resampled
from ebm_prior.errors import ConfigurationError, DataError, OutputError
from ebm_prior.figures import save_png
from ebm_prior.files import without_nan, write_atomically
from ebm_prior.pages import page
from ebm_prior.plots import histogram
from ebm_prior.prior import EBMPrior
from ebm_prior.randomness import BLOCK, derived_generator
from ebm_prior.scores import Form, Lower, Mode
from ebm_prior.training import Images, require_positive, require_seed

Array = NDArray[np.float64]
SYNTHETIC = ("noise", "constant")
FILES = ("scores.npz", "result.json", "histograms.png")
MODES: tuple[Mode, ...] = get_args(Mode)
LOWERS: tuple[Lower, ...] = get_args(Lower)
OnImages = Callable[[int], None]


@dataclass(frozen=True)
class OutlierConfig:
    """Settings of an evaluation of scores."""

    samples: int = field(default=10_000, metadata={"help": "images per set, at most; every set gives as many"})
    draws: int = field(default=8, metadata={"help": "S, draws of the latents per image, over which a score averages"})
    resamples: int = field(default=500, metadata={"help": "bootstrap resamples behind the 95 % intervals"})
    chunk: int = field(default=256, metadata={"help": "images at a time, rounded to blocks of 64; changes no result"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})

    def __post_init__(self) -> None:
        require_positive(self, "samples", "draws", "resamples", "chunk")
        require_seed(self)


class Scored(NamedTuple):
    """A set of images and their scores."""

    name: str
    rows: NDArray[np.int64]  # (N,): which images of the source
    values: Array  # (N, number of forms), nats


def every_form(ks: Sequence[int], modes: Sequence[Mode], lowers: Sequence[Lower]) -> list[Form]:
    """L^{>k} for every k, LLR^{>k} for every k but 0, in every mode and with every kind of lower groups, with f.

    "iw" has a meaning of its own in L^{>0} and in ratios, "prior" in L^{>0}.
    """
    ways = [(k, mode, lower) for k in ks for mode in modes for lower in (lowers if k else lowers[:1])]
    plain = [Form(k, False, mode, lower) for k, mode, lower in ways if mode in ("eq20", "elbo") or not k]
    return plain + [Form(k, True, mode, lower) for k, mode, lower in ways if k and mode != "prior"]


def parsed_k(text: str, groups: int) -> list[int]:
    """`all`, or numbers with commas between them: 0,1,2. Raises ConfigurationError."""
    if text == "all":
        return list(range(groups))
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        ks = [-1]
    if not 0 <= ks[0] <= ks[-1] < groups:
        raise ConfigurationError(
            f"--k: expected all, or numbers from 0 to {groups - 1} with commas between them (the backbone has {groups} "
            f"groups), found {text!r}"
        )
    return ks


def score_set(
    prior: EBMPrior, images: Images, forms: Sequence[Form], config: OutlierConfig, *, n: int, on_images: OnImages
) -> Scored:
    """Scores of n images, drawn without replacement where the set has more. `on_images` gets the number just done."""
    rows = torch.arange(len(images))
    if len(images) > n:
        rows = torch.randperm(len(images), generator=derived_generator(config.seed, 40))[:n].sort().values
    size = max(1, config.chunk // BLOCK) * BLOCK
    parts = []
    for first in range(0, len(rows), size):
        batch = images.batch(rows[first : first + size])
        found = prior.scores(batch, forms, draws=config.draws, seed=config.seed, first=first, chunk=size)
        parts.append(torch.stack([found[form] for form in forms], dim=1).double().cpu().numpy())
        on_images(len(batch))
    return Scored(images.name, rows.numpy(), np.concatenate(parts))


def compare(forms: Sequence[Form], outlying: Scored, others: Scored, config: OutlierConfig) -> list[dict[str, Any]]:
    """One row per form: its detection with and without f, and the paired difference, with 95 % intervals.

    `forms`: pairs, a form with f followed by the same without. Where only forms without f were scored, rows have no f.
    """
    columns = {form: (-1.0 if not form.ratio else 1.0, index) for index, form in enumerate(forms)}
    values = [
        {form.name: sign * scored.values[:, index] for form, (sign, index) in columns.items()}
        for scored in (outlying, others)
    ]
    drawn = resampled(*values, resamples=config.resamples, seed=config.seed)
    rows = []
    for form in (form for form in forms if not form.energy):
        row: dict[str, Any] = {"k": form.k, "score": "LLR" if form.ratio else "L", "mode": form.mode}
        row["lower"] = form.lower if form.k else None
        for key, variant in (("f=0", form), ("f", form._replace(energy=True))):
            if variant in columns:
                row[key] = _described(detection(values[0][variant.name], values[1][variant.name]), drawn[variant.name])
        if "f" in row:
            change = [row["f"][key] - row["f=0"][key] for key in Detection._fields]
            row["gain"] = _described(Detection(*change), drawn[form._replace(energy=True).name] - drawn[form.name])
        rows.append(row)
    return rows


def _described(value: Detection, drawn: Array) -> dict[str, Any]:
    around = interval(drawn)
    return value._asdict() | {"low": around.low._asdict(), "high": around.high._asdict()}


def find_outliers(
    prior: EBMPrior,
    inside: Images,
    outside: Sequence[Images],
    forms: Sequence[Form],
    config: OutlierConfig,
    *,
    on_images: OnImages = lambda count: None,
) -> tuple[dict[str, Any], list[Form], list[Scored]]:
    """Scores of equally many images of every set, `inside` first, and how well they tell each other set from it.

    forms: with f. They are scored without f, too, on the same draws. Returns the result (plain values), the forms in
    the order of the columns, and the scores.
    """
    n = set_size(inside, outside, config)
    both = [variant for form in forms for variant in (form, form._replace(energy=False))]
    scored = [score_set(prior, images, both, config, n=n, on_images=on_images) for images in (inside, *outside)]
    result = {
        "in": inside.name,
        "images": n,
        **settings(prior, config),
        "sets": [{"out": other.name, "rows": compare(both, other, scored[0], config)} for other in scored[1:]],
    }
    return result, both, scored


def settings(prior: EBMPrior, config: OutlierConfig) -> dict[str, Any]:
    """What the scores depend on."""
    return {
        "draws": config.draws,
        "resamples": config.resamples,
        "seed": config.seed,
        "sampler": asdict(prior.sampler),
        "tau": prior.tau,
    }


def set_size(inside: Images, outside: Sequence[Images], config: OutlierConfig) -> int:
    """Images per set: as many as the smallest has, at most `config.samples`."""
    return min(config.samples, *(len(images) for images in (inside, *outside)))


def find_anomalies(
    prior: EBMPrior,
    normal: Images,
    anomalous: Images,
    config: OutlierConfig,
    *,
    on_images: OnImages = lambda count: None,
) -> tuple[dict[str, Any], list[Form], list[Scored]]:
    """L^{>0} as the decision function (§5.4, Table 4), in every mode, over all images of both sets.

    AUPRC depends on the "prevalence" of anomalies, which is what a useless score has. Returns as `find_outliers`.
    """
    forms = [Form(0, mode=mode, energy=energy) for mode in MODES for energy in (True, False)]
    scored = [score_set(prior, s, forms, config, n=len(s), on_images=on_images) for s in (normal, anomalous)]
    result = {
        "in": normal.name,
        "images": [len(normal), len(anomalous)],
        "prevalence": len(anomalous) / (len(normal) + len(anomalous)),
        **settings(prior, config),
        "sets": [{"out": anomalous.name, "rows": compare(forms, scored[1], scored[0], config)}],
    }
    return result, forms, scored


def open_set(spec: str, shape: tuple[int, int, int], n: int, *, seed: int, **where: Any) -> Images:
    """The test images of `spec`, brought to the shape of the backbone's as far as nothing is lost by it.

    Grey images become colour images of three equal channels, smaller ones get a black frame; the name says so. `noise`
    is n images of independent uniform pixels, `constant` n images of one colour each. `where`: of `open_images`.
    Raises DataError for images that do not fit.
    """
    if spec in SYNTHETIC:
        random = np.random.default_rng([seed, SYNTHETIC.index(spec)])
        pixels = random.integers(0, 256, (n, *(shape if spec == "noise" else (shape[0], 1, 1))), dtype=np.uint8)
        return from_array(np.ascontiguousarray(np.broadcast_to(pixels, (n, *shape))), name=spec)
    source = open_images(spec, split="test", **where)
    return source if source.shape == shape else Adapted(source, shape)


class Adapted:
    """Images of a source as colour images, or within a black frame."""

    def __init__(self, source: ImageSource, shape: tuple[int, int, int]) -> None:
        self._source, self._shape = source, shape
        (channels, height, width), (wanted, *sides) = source.shape, shape
        self._frame = [(side - own) for side, own in zip(sides, (height, width), strict=True)]
        if channels not in (1, wanted) or min(self._frame) < 0:
            raise DataError(
                f"{source.name}: expected images of shape {shape}, or grey or smaller ones that can be made so without "
                f"a loss; found {source.shape}. Resize them first"
            )
        done = ["as RGB"] * (channels != wanted) + [f"padded to {sides[0]}×{sides[1]}"] * (max(self._frame) > 0)
        self.name = f"{source.name} ({', '.join(done)})"

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images (B, C, H, W) in [0, 1]."""
        down, across = self._frame
        sides = (across // 2, across - across // 2, down // 2, down - down // 2)
        images = torch.nn.functional.pad(self._source.batch(indices), sides)
        return images.expand(-1, self._shape[0], -1, -1).contiguous()


def labelled(source: ImageSource, labels: Sequence[int], *, among: bool) -> ImageSource:
    """The images whose label is among `labels`, or the others. Without any `labels`: all of them.

    Raises DataError where the source has no labels, or no such image is there.
    """
    if not labels:
        return source
    if source.labels is None:
        raise DataError(f"{source.name} has no labels: leave --labels out, or give labelled images")
    chosen = torch.isin(source.labels, torch.tensor(labels)) == among
    if not chosen.any():
        found = ", ".join(map(str, sorted(set(source.labels.tolist()))))
        raise DataError(f"{source.name}: no image is left with --labels {labels}; its labels are {found}")
    return source.subset(chosen.nonzero()[:, 0])


def write_scores(path: Path, forms: Sequence[Form], scored: Sequence[Scored]) -> None:
    """An .npz: `scores`, the names of columns; `sets`, names; and of set i `values_i` (N, columns), `rows_i` (N,)."""
    arrays: dict[str, Any] = {"scores": np.array([form.name for form in forms])}
    arrays["sets"] = np.array([each.name for each in scored])
    for index, each in enumerate(scored):
        arrays |= {f"values_{index}": each.values, f"rows_{index}": each.rows}
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def write_results(
    folder: Path, result: Mapping[str, Any], forms: Sequence[Form], scored: Sequence[Scored], title: str
) -> list[str]:
    """scores.npz, result.json and histograms.png in a folder; returns their paths."""
    write_scores(folder / "scores.npz", forms, scored)
    write_atomically(
        folder / "result.json", (json.dumps(without_nan(result), indent=2, sort_keys=True) + "\n").encode()
    )
    save_png(histograms(result, forms, scored, title), folder / "histograms.png")
    return [str(folder / name) for name in FILES]


def require_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a place for results that holds other files, or results without `overwrite`, or cannot be written.

    Raises OutputError, before work is done.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder for the results: choose another --to")
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
    if set(held) - set(FILES):
        raise OutputError(f"{folder} holds other files than scores ({held[0]}, …): choose another --to")
    if held and not overwrite:
        raise OutputError(f"{folder} holds results: pass --overwrite to replace them, or another --to")
    require_writable(folder)


def histograms(result: Mapping[str, Any], forms: Sequence[Form], scored: Sequence[Scored], title: str) -> Image.Image:
    """Densities of every score with f (Fig. 6): a column per L^{>k} and LLR^{>k}, a row per mode and lower groups."""
    outside = result["sets"][-1]
    quality = {(row["score"], row["k"], row["mode"], row["lower"]): row["f"] for row in outside["rows"]}
    shown = {form: column for column, form in enumerate(forms) if form.energy}
    scores = sorted({(form.ratio, form.k) for form in shown})
    size = (400, 290)
    rows = []
    for mode, lower in [way for way in product(MODES, LOWERS) if any(form[2:4] == way for form in shown)]:
        cells = []
        for ratio, k in scores:
            form = next((f for f in shown if f[:3] == (k, ratio, mode) and (not k or f.lower == lower)), None)
            if form is None:  # iw differs from elbo in L^{>0} and the ratios to it alone
                cells.append(Image.new("RGB", size, "white"))
                continue
            name = f"{'LLR' if ratio else 'L'}>{k}"
            found = quality["LLR" if ratio else "L", k, mode, lower if k else None]
            cells.append(
                histogram(
                    {each.name: each.values[:, shown[form]] for each in scored},
                    title=f"{name}, {mode}{f', {lower}' if k else ''}: AUROC {found['auroc']:.3f}",
                    x_label=f"{name} (nats)",
                    y_label="density (1/nat)",
                    size=size,
                )
            )
        rows.append(cells)
    return page(
        title,
        rows,
        [
            f"{result['draws']} draws per image. L>k: unnormalised log-posterior with the k lowest groups not inferred "
            "but taken from the prior given the others (Eq. 20), as samples or means; LLR>k = L>0 - L>k (Eq. 21); both "
            f"with f. Outliers have low L and high LLR; the AUROC is that of {outside['out']}."
        ],
    )
