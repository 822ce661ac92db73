import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.metrics import roc_auc_score

from ebm_prior.errors import ConfigurationError, DataError
from ebm_prior.evaluation.metrics import (
    FeatureStatistics,
    auroc,
    extract,
    frechet_distance,
    gap_closed,
    kernel_distance,
)


def correlated(n, d, seed, shift=0.0):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, d)) @ random.normal(size=(d, d)) / math.sqrt(d) + shift


def test_frechet_distance_is_the_formula_with_a_matrix_square_root():
    a, b = correlated(300, 12, 0), correlated(200, 12, 1, shift=0.3)
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * scipy.linalg.sqrtm(sa @ sb).real)
    assert frechet_distance(a, torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    def statistics(mean, std):
        return FeatureStatistics(np.full(3, mean), np.diag(np.full(3, std**2)), 10)

    # Isotropic Gaussians: ‖Δμ‖² + D (σ_a − σ_b)².
    assert frechet_distance(statistics(0.0, 1.0), statistics(2.0, 3.0)) == pytest.approx(3 * 4 + 3 * 4)


def test_frechet_distance_survives_fewer_samples_than_dimensions():
    a = correlated(20, 64, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 1) == pytest.approx(64, rel=1e-6)


def test_cached_statistics_stand_for_the_features():
    a, b = correlated(50, 5, 0), correlated(60, 5, 1)
    cached = FeatureStatistics.of(torch.from_numpy(a).float())
    np.testing.assert_allclose(cached.covariance, np.cov(a, rowvar=False), rtol=1e-5)
    assert cached.n == 50
    assert frechet_distance(cached, b) == pytest.approx(frechet_distance(a, b), rel=1e-5)
    assert cached.digest == FeatureStatistics.of(torch.from_numpy(a).float()).digest != FeatureStatistics.of(b).digest


def test_statistics_leave_the_features_as_they_were():
    a = correlated(50, 5, 0)
    before = a.copy()
    FeatureStatistics.of(a)
    np.testing.assert_array_equal(a, before)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_refuse_what_they_cannot_compare(distance):
    good = correlated(30, 4, 0)
    broken = good.copy()
    broken[7, 2] = np.nan
    with pytest.raises(DataError, match="first row 7"):
        distance(good, broken)
    with pytest.raises(DataError, match="at least 2 images"):
        distance(good[:1], good)
    with pytest.raises(DataError, match="4 and 3 dimensions"):
        distance(good, good[:, :3])


def test_kernel_distance_is_clean_fids():
    from cleanfid.fid import kernel_distance as reference

    a, b = correlated(80, 16, 0), correlated(80, 16, 1, shift=0.5)
    # One subset that holds everything: only the order is random, and the estimator does not depend on it.
    assert kernel_distance(a, b, subsets=1, subset_size=80) == pytest.approx(reference(a, b, 1, 80), rel=1e-9)


def test_kernel_distance_is_unbiased_and_repeatable():
    values = [
        kernel_distance(correlated_pair[:100], correlated_pair[100:], subsets=1) for correlated_pair in _pairs(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))
    a, b = correlated(300, 6, 0), correlated(300, 6, 1)
    assert kernel_distance(a, b, subset_size=50, seed=3) == kernel_distance(a, b, subset_size=50, seed=3)
    assert kernel_distance(a, b, subset_size=50, seed=3) != kernel_distance(a, b, subset_size=50, seed=4)


def _pairs(repeats):
    random = np.random.default_rng(0)
    return [random.normal(size=(200, 4)) for _ in range(repeats)]


def test_kernel_distance_refuses_empty_subsets():
    with pytest.raises(ConfigurationError, match="subset_size"):
        kernel_distance(np.zeros((4, 2)), np.ones((4, 2)), subset_size=1)


def test_gap_closed():
    assert gap_closed(50.0, 20.0, 10.0) == pytest.approx(0.75)
    assert gap_closed(50.0, 60.0, 10.0) == pytest.approx(-0.25)
    assert math.isnan(gap_closed(10.0, 5.0, 10.0))
    assert math.isnan(gap_closed(9.0, 5.0, 10.0))


def test_auroc_with_ties_is_scikit_learns():
    random = np.random.default_rng(0)
    p, n = random.integers(0, 6, 150).astype(float) + 1, random.integers(0, 6, 90).astype(float)
    expected = roc_auc_score(np.r_[np.ones(150), np.zeros(90)], np.r_[p, n])
    assert auroc(torch.from_numpy(p), n) == pytest.approx(expected, abs=1e-12)
    assert auroc(n, p) == pytest.approx(1 - expected, abs=1e-12)
    assert auroc([np.inf], [0.0]) == 1
    assert auroc([1.0], [1.0]) == 0.5


def test_auroc_refuses_nan_and_empty():
    with pytest.raises(DataError):
        auroc([1.0, math.nan], [0.0])
    with pytest.raises(DataError):
        auroc([], [0.0])


def test_extract_runs_in_batches_without_gradients():
    class Mean:
        name, distance_name = "mean", "FD(mean)"

        def features(self, images):
            assert len(images) <= 4
            return images.mean((2, 3))

    images = torch.rand(10, 3, 8, 8, requires_grad=True)
    found = extract(Mean(), images, batch_size=4)
    assert not found.requires_grad
    torch.testing.assert_close(found, images.mean((2, 3)))


def test_import_is_light():
    code = (
        "import sys, ebm_prior.evaluation.metrics; print({'torchvision', 'cleanfid', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
