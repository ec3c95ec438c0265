"""Distances between sets of images, measured in a feature space. NumPy only, float64 inside."""

from __future__ import annotations

import numpy as np


def class_accuracy(predicted, labels) -> float:
    """The share of `predicted` [N] equal to `labels` [N]."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(predicted):
        raise ValueError(
            f"predicted and labels must be two lists of one length, "
            f"got shapes {predicted.shape} and {labels.shape}"
        )
    return float(np.mean(predicted == labels))


def frechet_distance(a, b) -> float:
    """Frechet distance between the Gaussians fitted to features a [N, D] and b [M, D].

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), A and B the covariances
    (N - 1 in the denominator, as the published evaluators have it); Heusel et al. 2017, eq. 6. The
    square roots are symmetric, so eigh gives them without a general matrix root. Biased upwards for
    few samples: compare sets of one size only.
    """
    a, b = _features("a", a), _features("b", b)
    _same_width(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"at least 2 samples are needed, got {len(a)} and {len(b)}")
    difference = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    overlap = np.sqrt(np.maximum(cross, 0)).sum()
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return float(max(distance, 0.0))


def precision_recall(reference, samples, k: int = 3, block: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) of samples [M, D].

    A set's manifold is the union of the balls around its points that reach to their k-th nearest
    neighbour in the set. Precision: the share of samples in the manifold of reference [N, D];
    recall: the share of reference points in the manifold of the samples. Distances are computed
    `block` rows at a time. Both values depend on N and M: compare equal sizes only.
    """
    reference, samples = _centred(reference, samples)
    _check_neighbours(k, min(len(reference), len(samples)), block)
    reference_radii = _squared_radii(reference, k, block)
    sample_radii = _squared_radii(samples, k, block)
    precision = _share_inside(samples, reference, reference_radii, block)
    recall = _share_inside(reference, samples, sample_radii, block)
    return precision, recall


def coverage(reference, samples, k: int = 5, block: int = 1024) -> float:
    """Coverage (Naeem et al. 2020, eq. 5): the share of reference [N, D] near a sample of [M, D].

    Near: no further than the reference point's k-th nearest neighbour in the reference. Unlike
    recall, it does not grow with samples that lie far from all others, whose neighbours are far
    too. Depends on N and M: compare equal sizes only.
    """
    reference, samples = _centred(reference, samples)
    _check_neighbours(k, len(reference), block)
    radii = _squared_radii(reference, k, block)
    near = 0
    for start in range(0, len(reference), block):
        rows = slice(start, start + block)
        nearest = _squared_distances(reference[rows], samples).min(1)
        near += int((nearest <= radii[rows]).sum())
    return near / len(reference)


def _centred(reference, samples) -> tuple[np.ndarray, np.ndarray]:
    reference, samples = _features("reference", reference), _features("samples", samples)
    _same_width(reference, samples)
    # One centre for both, so that |x|^2 + |y|^2 - 2xy loses few digits.
    centre = reference.mean(0)
    return reference - centre, samples - centre


def _check_neighbours(k: int, points: int, block: int) -> None:
    if not 1 <= k < points:
        raise ValueError(
            f"k={k} must be at least 1 and less than the number of points, which is {points}"
        )
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")


def _squared_radii(points: np.ndarray, k: int, block: int) -> np.ndarray:
    """Squared distance of each of points [N, D] to its k-th nearest other point: [N]."""
    radii = np.empty(len(points))
    for start in range(0, len(points), block):
        rows = slice(start, start + block)
        squared = _squared_distances(points[rows], points)
        own = np.arange(len(squared))
        squared[own, start + own] = -1.0  # itself is first, whatever the rounding
        radii[rows] = np.partition(squared, k, axis=1)[:, k]
    return radii


def _share_inside(points, manifold, squared_radii, block) -> float:
    """The share of points [N, D] within the radius of at least one point of manifold [M, D]."""
    inside = 0
    for start in range(0, len(points), block):
        squared = _squared_distances(points[start : start + block], manifold)
        inside += int((squared <= squared_radii).any(1).sum())
    return inside / len(points)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * (x @ y.T)
    return np.maximum(squared, 0, out=squared)


def _features(name: str, value) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be features [N, D], got shape {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(1))[0])
        raise ValueError(f"{name} must be finite, but row {row} holds NaN or infinity")
    return array


def _same_width(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"both sets must have features of one width, got {a.shape[1]}, {b.shape[1]}"
        )
