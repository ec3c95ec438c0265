"""The metrics against closed forms and hand-made point sets."""

import numpy as np
import pytest

from adm_rt.evaluation import class_accuracy, coverage, frechet_distance, precision_recall


def gaussian(seed, count, mean, factor):
    """Points whose SAMPLE mean is `mean` and sample covariance is factor @ factor.T, exactly."""
    raw = np.random.default_rng(seed).standard_normal((count, len(mean)))
    raw -= raw.mean(0)
    raw = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False)).T)
    return raw @ factor.T + mean


def test_frechet_of_a_set_with_itself_is_zero():
    points = np.random.default_rng(0).standard_normal((500, 64)) * np.linspace(0, 30, 64)
    assert frechet_distance(points, points) < 1e-8 * points.var(0).sum()
    assert frechet_distance(points, points[::-1]) < 1e-8 * points.var(0).sum()


def test_frechet_of_a_shift_is_its_squared_length():
    points = np.random.default_rng(1).standard_normal((300, 10))
    shift = np.arange(10) / 3
    assert frechet_distance(points, points + shift) == pytest.approx(shift @ shift, rel=1e-9)


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    # Same eigenvectors: |m|^2 + sum (s_a - s_b)^2.
    rotation, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))
    s_a, s_b = np.array([1, 2, 3, 4, 5, 6.0]), np.array([2, 2, 1, 7, 0.5, 0])
    mean = np.array([1, 0, 0, 0, 0, -2.0])
    a = gaussian(3, 400, np.zeros(6), rotation * s_a)
    b = gaussian(4, 500, mean, rotation * s_b)
    assert frechet_distance(a, b) == pytest.approx(5 + ((s_a - s_b) ** 2).sum(), rel=1e-9)


def test_frechet_of_general_gaussians_is_the_matrix_formula():
    # tr (AB)^1/2 from the eigenvalues of the (not symmetric) product, an independent route.
    rng = np.random.default_rng(5)
    f_a, f_b = rng.standard_normal((2, 5, 5))
    a, b = gaussian(6, 200, np.zeros(5), f_a), gaussian(7, 300, np.ones(5), f_b)
    cov_a, cov_b = f_a @ f_a.T, f_b @ f_b.T
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    expected = 5 + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_with_fewer_samples_than_dimensions_is_finite():
    rng = np.random.default_rng(8)
    value = frechet_distance(rng.standard_normal((10, 64)), rng.standard_normal((12, 64)))
    assert np.isfinite(value) and value > 0


def test_precision_and_recall_by_hand():
    # On a line, k=1. Reference 0, 1, 10, 12: radii 1, 1, 2, 2 -> [-1, 2] and [8, 14].
    # Samples 2, 2.5, 20: radii .5, .5, 17.5 -> [1.5, 3] and [2.5, 37.5].
    reference = np.array([[0.0], [1], [10], [12]])
    samples = np.array([[2.0], [2.5], [20]])
    precision, recall = precision_recall(reference, samples, k=1)
    assert precision == pytest.approx(1 / 3)  # only 2, on the edge of the ball around 1
    assert recall == pytest.approx(2 / 4)  # 10 and 12


def test_coverage_by_hand():
    reference = np.array([[0.0], [1], [10], [12]])  # k=1: radii 1, 1, 2, 2
    assert coverage(reference, np.array([[1.5]]), k=1) == 1 / 4
    assert coverage(reference, np.array([[0.5], [13], [100]]), k=1, block=3) == 3 / 4
    assert coverage(reference, reference, k=3) == 1.0
    with pytest.raises(ValueError, match="k=4"):
        coverage(reference, reference, k=4)


def test_samples_far_away_raise_recall_but_not_coverage():
    rng = np.random.default_rng(7)
    real, fake = rng.standard_normal((300, 8)), 0.3 * rng.standard_normal((100, 8))
    far = np.concatenate([fake, 20 * rng.standard_normal((20, 8))])
    assert coverage(real, far) == coverage(real, fake) < 0.6
    assert precision_recall(real, far)[1] > precision_recall(real, fake)[1] + 0.3


@pytest.mark.parametrize("block", [1, 7, 64, 10000])
def test_precision_recall_in_blocks_is_the_direct_computation(block):
    rng = np.random.default_rng(9)
    reference, samples = rng.standard_normal((90, 4)), rng.standard_normal((70, 4)) * 0.5 + 0.9

    def covered(points, manifold):
        own = np.sort(np.linalg.norm(manifold[:, None] - manifold[None], axis=-1), axis=1)[:, 3]
        return np.mean((np.linalg.norm(points[:, None] - manifold, axis=-1) <= own).any(1))

    expected = covered(samples, reference), covered(reference, samples)
    assert precision_recall(reference, samples, block=block) == pytest.approx(expected)
    assert 0 < expected[1] != expected[0] < 1  # the case can tell one from the other


def test_precision_recall_of_known_failures():
    rng = np.random.default_rng(10)
    real = rng.standard_normal((400, 8)).astype(np.float32)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    centre = 1e-3 * rng.standard_normal((400, 8))
    precision, recall = precision_recall(real, centre)  # collapse: all good, nothing covered
    assert precision == 1.0 and recall < 0.01
    same = np.repeat(real[:1], 400, 0)  # one image 400 times: radii are zero
    assert precision_recall(real, same) == (1.0, 1 / 400)


def test_precision_recall_far_from_the_origin():
    rng = np.random.default_rng(11)
    real, fake = rng.standard_normal((2, 200, 8))
    near = precision_recall(real, fake)
    assert precision_recall(real + 1e8, fake + 1e8) == pytest.approx(near, abs=0.011)


def test_class_accuracy():
    assert class_accuracy([1, 2, 3, 4], np.array([1, 2, 0, 0])) == 0.5
    for predicted, labels in (([1], [1, 2]), ([], []), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="shapes"):
            class_accuracy(predicted, labels)


@pytest.mark.parametrize(
    ("metric", "a", "b", "words"),
    [
        (frechet_distance, np.zeros((1, 3)), np.zeros((5, 3)), "at least 2"),
        (frechet_distance, np.zeros((5, 3)), np.zeros((5, 4)), "one width, got 3, 4"),
        (frechet_distance, np.zeros(5), np.zeros((5, 4)), r"a must be features \[N, D\]"),
        (frechet_distance, np.zeros((5, 4)), np.full((5, 4), np.nan), "b must be finite.*row 0"),
        (precision_recall, np.zeros((3, 2)), np.zeros((9, 2)), "k=3"),
        (precision_recall, np.zeros((9, 2)), np.full((9, 2), np.inf), "samples must be finite"),
        (precision_recall, np.zeros((9, 0)), np.zeros((9, 0)), r"\[N, D\]"),
    ],
)
def test_bad_features_are_named(metric, a, b, words):
    with pytest.raises(ValueError, match=words):
        metric(a, b)


def test_bad_neighbourhoods_are_named():
    points = np.zeros((9, 2))
    with pytest.raises(ValueError, match="k=0"):
        precision_recall(points, points, k=0)
    with pytest.raises(ValueError, match="block=0"):
        precision_recall(points, points, block=0)
