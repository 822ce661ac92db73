"""Detection numbers against scikit-learn, ties included, and what a bootstrap must do."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from ebm_prior.errors import DataError
from ebm_prior.evaluation.detection import detection, interval, resampled
from ebm_prior.evaluation.metrics import auroc


@pytest.mark.parametrize("ties", [False, True])
def test_the_four_numbers_are_scikit_learns(ties: bool) -> None:
    random = np.random.default_rng(0)
    out, others = random.normal(0.8, 1, 300), random.normal(0, 1, 170)
    if ties:
        out, others = out.round(), others.round()
    found = detection(out, others)
    labels, scores = np.repeat([1, 0], [300, 170]), np.concatenate([out, others])
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(labels, scores)
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores)) == pytest.approx(auroc(out, others))
    assert found.auprc == pytest.approx(average_precision_score(labels, scores))
    assert found.fpr80 == pytest.approx(fpr[np.argmax(tpr >= 0.8)])
    assert found.auprc_trapezoid == pytest.approx(auc(recall, precision))


def test_perfect_useless_and_inverted_scores() -> None:
    up, down = np.array([2.0, 3.0]), np.array([0.0, 1.0])
    assert detection(up, down) == (1, 1, 1, 0)
    assert detection(down, up).auroc == 0
    assert detection(down, up).fpr80 == 1
    assert detection(np.zeros(3), np.zeros(9)) == pytest.approx((0.5, 0.25, 0.625, 1))


def test_weights_of_a_resample_are_repeated_images() -> None:
    """The interval of the mean difference of two scores is the bootstrap's over images taken with replacement."""
    random = np.random.default_rng(1)
    out, others = {"a": random.normal(1, 1, 40)}, {"a": random.normal(0, 1, 30)}
    found = resampled(out, others, resamples=3, seed=7)["a"]
    again = np.random.default_rng(7)
    for row in found:
        chosen = [again.integers(40, size=40), again.integers(30, size=30)]
        assert tuple(row) == pytest.approx(tuple(detection(out["a"][chosen[0]], others["a"][chosen[1]])))


def test_intervals_cover_and_pairs_are_tighter() -> None:
    random = np.random.default_rng(2)
    covered, widths = 0, []
    for trial in range(40):  # two scores that share most of their noise; AUROC of N(1, 1) against N(0, 1) is Φ(1/√2)
        out, others = random.normal(1, 1, 150), random.normal(0, 1, 150)
        noise = random.normal(0, 0.1, (2, 150))
        values = {"a": out, "b": out + noise[0]}, {"a": others, "b": others + noise[1]}
        found = resampled(*values, resamples=100, seed=trial)
        low, high = interval(found["a"])
        covered += low.auroc < 0.760250 < high.auroc
        paired = interval(found["a"] - found["b"])
        widths.append((paired.high.auroc - paired.low.auroc) / (high.auroc - low.auroc))
    assert 34 <= covered <= 40
    assert np.mean(widths) < 0.3


@pytest.mark.parametrize("out", [[], [np.nan, 1.0], [np.inf]])
def test_scores_that_are_none_are_refused(out: list[float]) -> None:
    with pytest.raises(DataError, match="expected finite scores"):
        detection(np.array(out), np.zeros(2))
