"""The digits experiment's measurements: real, Gaussian and broken images are told apart."""

import numpy as np
import pytest
import torch

from adm_rt.data import digits
from adm_rt.evaluation.digits import DigitScores, compare, gaussian_digits, markdown_table

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def scores():
    return DigitScores(epochs=6)


def test_the_networks_know_digits_and_leave_the_random_state(scores):
    assert scores.features_accuracy > 0.9 and scores.judge_accuracy > 0.9
    state = torch.get_rng_state()
    DigitScores(epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_sets_are_ranked_as_they_deserve(scores):
    images, labels = digits("heldout")
    real = scores(images, labels)
    noise = np.random.default_rng(0).integers(0, 256, (449, 8, 8, 1), np.uint8).repeat(3, 3)
    noisy = scores(noise, labels)
    train, train_labels = digits("train")
    gaussian = scores(gaussian_digits(train, train_labels, labels, 0), labels)
    assert real["fd"] < gaussian["fd"] < 0.1 * noisy["fd"]
    assert real["recall"] > gaussian["recall"] > noisy["recall"]
    assert real["accuracy"] > 0.9 > noisy["accuracy"] and real["copies"] == 0
    assert scores(images, (labels + 1) % 10)["accuracy"] < 0.1
    copied = scores(train[:449], train_labels[:449])
    assert copied["copies"] == 449 and copied["nearest"] == 0
    mode = scores(images[np.searchsorted(np.sort(labels), labels * 0)], labels)
    assert mode["recall"] < 0.2  # one image, 449 times


def test_gaussians_have_the_moments_of_their_class():
    images, labels = digits("train")
    made = gaussian_digits(images, labels, np.full(2000, 3), seed=1)
    own = images[labels == 3][..., 0].astype(float)
    assert made.shape == (2000, 8, 8, 3) and made.dtype == np.uint8
    inner = own.mean(0) > 60  # clipping moves the others
    assert np.abs(made[..., 0].mean(0) - own.mean(0))[inner].max() < 20
    again = gaussian_digits(images, labels, np.full(2000, 3), seed=1)
    assert np.array_equal(made, again)


def test_every_row_has_the_classes_of_the_reference(scores, monkeypatch):
    """Other proportions raise the distance of real images above that of a good model."""
    asked, seen = [], []
    score = DigitScores.__call__

    def spy(self, images, labels):
        seen.append((images, np.asarray(labels)))
        return score(self, images, labels)

    monkeypatch.setattr(DigitScores, "__call__", spy)

    def sample(labels, seed):
        asked.append((len(labels), seed))
        return digits("test")[0]

    rows = compare(scores, sample, seeds=(3, 4))
    assert asked == [(449, 3), (449, 4)]
    assert list(rows) == ["model", "gaussian", "held-out", "training"]
    assert all(np.array_equal(labels, scores.reference_labels) for _, labels in seen)
    monkeypatch.undo()
    own = {n: digits(n) for n in ("heldout", "train")}
    for images, name in ((seen[4][0], "heldout"), (seen[6][0], "train")):
        known = {i.tobytes(): label for i, label in zip(*own[name])}
        assert [known[i.tobytes()] for i in images] == scores.reference_labels.tolist()
    assert rows["training"]["repeated"] == 0 and 0 < rows["held-out"]["repeated"] < 60
    unmatched = scores(*own["heldout"])["fd"]
    assert rows["held-out"]["fd"] < 0.7 * unmatched
    assert rows["model"]["fd"] < 1e-3 and rows["gaussian"]["fd_sd"] > 0
    assert len(markdown_table(rows).splitlines()) == 6


def test_images_of_another_size_are_refused(scores):
    with pytest.raises(ValueError, match=r"uint8 \[N, 8, 8, 3\]"):
        scores(np.zeros((4, 16, 16, 3), np.uint8), [0] * 4)
