"""The result folder of `ood` and `anomaly`: scores, tables, histograms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebm_prior.errors import OutputError
from ebm_prior.evaluation.outliers import Scored
from ebm_prior.model.scores import DERIVED, LOWERS, MODES, Form
from ebm_prior.pictures.grids import save_png
from ebm_prior.pictures.plots import histogram
from ebm_prior.pictures.sheets import page
from ebm_prior.storage.atomic import without_nan, write_atomically
from ebm_prior.storage.lock import owned
from ebm_prior.storage.places import require_writable

FILES = SCORES, TERMS, RESULT, HISTOGRAMS = ("scores.npz", "terms.npz", "result.json", "histograms.png")
_MOST_COLUMNS, _SIZE = 7, (400, 290)  # of histograms


def write_scores(path: Path, forms: Sequence[Form], scored: Sequence[Scored]) -> None:
    """Write an .npz: `scores`, names of columns; `sets`, names; for set i `values_i` (N, columns) and `rows_i` (N,)."""
    arrays: dict[str, Any] = {"scores": np.array([form.name for form in forms]), "sets": _names(scored)}
    for index, each in enumerate(scored):
        arrays |= {f"values_{index}": each.values, f"rows_{index}": each.rows}
    _write(path, arrays)


def write_terms(path: Path, scored: Sequence[Scored]) -> None:
    """Write an .npz: `terms`, names of columns; `sets`, names; for set i `values_i` (N, columns), `rows_i`, `code_i`.

    The columns are `EBMPrior.terms`; `code_i` (N,) is the length of a lossless code (PNG) of each image, as the
    likelihood sees it. Both are in nats.
    """
    arrays: dict[str, Any] = {"terms": np.array(list(scored[0].terms)), "sets": _names(scored)}
    for index, each in enumerate(scored):
        values = np.stack(list(each.terms.values()), axis=1)
        arrays |= {f"values_{index}": values, f"rows_{index}": each.rows, f"code_{index}": each.code}
    _write(path, arrays)


def _names(scored: Sequence[Scored]) -> NDArray[np.str_]:
    return np.array([each.name for each in scored])


def _write(path: Path, arrays: dict[str, Any]) -> None:
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def write_results(
    folder: Path, result: Mapping[str, Any], forms: Sequence[Form], scored: Sequence[Scored], title: str
) -> list[str]:
    """Write the `FILES` of a result into a folder; returns their paths. `title`: of the picture."""
    text = json.dumps(without_nan(result), indent=2, sort_keys=True) + "\n"
    with owned(folder):
        write_scores(folder / SCORES, forms, scored)
        write_terms(folder / TERMS, scored)
        write_atomically(folder / RESULT, text.encode())
        save_png(histograms(result, forms, scored, title), folder / HISTOGRAMS)
    return [str(folder / name) for name in FILES]


def require_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a place for results that holds other files, or results without `overwrite`, or cannot be written.

    Raises OutputError, before work is done.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder for the results: choose another --out")
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []
    if set(held) - set(FILES):
        raise OutputError(f"{folder} holds other files than scores ({held[0]}, …): choose another --out")
    if held and not overwrite:
        raise OutputError(f"{folder} holds results: pass --overwrite to replace them, or another --out")
    require_writable(folder)


def histograms(result: Mapping[str, Any], forms: Sequence[Form], scored: Sequence[Scored], title: str) -> Image.Image:
    """Densities of every score with f (Fig. 6): one row each of L^{>k} and of LLR^{>k} per mode and lower groups."""
    outside = result["sets"][-1]
    quality = {(row["score"], row["k"], row["mode"], row["lower"]): row["f"] for row in outside["rows"]}
    shown = {form: column for column, form in enumerate(forms) if form.energy}
    rows = []
    for ratio, mode, lower in product((False, True), (*MODES, *DERIVED), LOWERS):
        row = [f for f in shown if (f.ratio, f.mode) == (ratio, mode) and (not f.k or f.lower == lower)]
        again = lower != LOWERS[0]  # L^{>0} has no lower groups: it is shown in the first of the rows
        if again and not any(form.k for form in row):
            continue
        cells = []
        for form in sorted(row, key=lambda form: form.k):
            if again and not form.k:
                cells.append(Image.new("RGB", _SIZE, "white"))
                continue
            name = f"{'LLR' if ratio else 'L'}>{form.k}"
            found = quality["LLR" if ratio else "L", form.k, mode, lower if form.k else None]
            cells.append(
                histogram(
                    {each.name: each.values[:, shown[form]] for each in scored},
                    title=f"{name}, {mode}{f', {lower}' if form.k else ''}: AUROC {found['auroc']:.3f}",
                    x_label=f"{name} (nats)",
                    y_label="density (1/nat)",
                    size=_SIZE,
                )
            )
        rows += [cells[i : i + _MOST_COLUMNS] for i in range(0, len(cells), _MOST_COLUMNS)]
    return page(
        title,
        rows,
        [
            f"Posterior draws per image: {result['draws']}. L>k: unnormalised log-posterior with the k lowest groups "
            "not inferred but taken from the prior given the others (Eq. 20), as samples or means; LLR>k = L>0 - L>k "
            f"(Eq. 21); both with f. Outliers have low L and high LLR; the AUROC is that of {outside['out']}."
        ],
    )
