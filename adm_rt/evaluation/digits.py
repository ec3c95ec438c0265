"""How good 8x8 digits are, measured offline: scikit-learn's real handwriting as data and judge.

Two small convolutional networks are trained on it when needed (under a minute on one core): one
gives the feature space of the Frechet distance, precision and recall (trained on the training
split), another judges the class (trained on training and held-out split). Beside a model's samples
the same numbers are given for the floor (held-out real images), for a Gaussian fitted to each class
in pixels, which a model has to beat, and for the training images themselves, which only the
distance to the nearest neighbour gives away. All sets have the same classes in the same numbers.
The distance is called FD-digits: it is no FID.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from adm_rt.data import digits
from adm_rt.evaluation.metrics import class_accuracy, frechet_distance, precision_recall

_FEATURES = 64


class DigitNet(nn.Module):
    """Three convolutions and 64 features: grey [N, 1, 8, 8] in [0, 1] -> logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 16, _FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(_FEATURES, 10)

    def forward(self, x):
        return self.head(self.trunk(x))


def train_digit_net(images, labels, seed: int, epochs: int = 40) -> DigitNet:
    """Trained on images uint8 [N, 8, 8, 3], shifted by up to a pixel, and labels [N].

    A function of its arguments on one machine; torch's global random state is left alone.
    """
    x, y = _grey(images), torch.from_numpy(np.asarray(labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitNet()
        optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
        batches = -(-len(x) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, 4e-3, total_steps=epochs * batches
        )
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                padded = F.pad(x[rows], (1, 1, 1, 1))
                top, left = torch.randint(3, (2,)).tolist()
                logits = net(padded[:, :, top : top + 8, left : left + 8])
                loss = F.cross_entropy(logits, y[rows], label_smoothing=0.05)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return net.eval()


class DigitScores:
    """The networks and the reference images (split "test", 449) that sets of digits are held to.

    features_accuracy, judge_accuracy: of the two networks on images they were not trained on.
    """

    def __init__(self, seed: int = 0, epochs: int = 40):
        self.train, train_labels = digits("train")
        held_out, held_out_labels = digits("heldout")
        self.reference, self.reference_labels = digits("test")
        self.net = train_digit_net(self.train, train_labels, seed, epochs)
        both = np.concatenate([self.train, held_out])
        both_labels = np.concatenate([train_labels, held_out_labels])
        self.judge = train_digit_net(both, both_labels, seed + 1, epochs)
        self._reference_features = self._features(self.reference)
        self.features_accuracy = class_accuracy(_classes(self.net, held_out), held_out_labels)
        self.judge_accuracy = class_accuracy(
            _classes(self.judge, self.reference), self.reference_labels
        )

    def __call__(self, images, labels) -> dict:
        """Scores of images uint8 [N, 8, 8, 3] meant to be ``labels`` [N].

        "fd": FD-digits to the reference; "precision", "recall" (k = 3); "accuracy": share that the
        judge takes for their labels; "nearest": median distance (grey levels, L2) to the nearest
        training image; "copies": images that are one.
        """
        images = np.asarray(images)
        features = self._features(images)
        precision, recall = precision_recall(self._reference_features, features)
        nearest = _nearest(images, self.train)
        return {
            "fd": frechet_distance(features, self._reference_features),
            "precision": precision,
            "recall": recall,
            "accuracy": class_accuracy(_classes(self.judge, images), labels),
            "nearest": float(np.median(nearest)),
            "copies": int((nearest == 0).sum()),
        }

    @torch.no_grad()
    def _features(self, images):
        return self.net.trunk(_grey(images)).numpy()


def gaussian_digits(images, labels, wanted, seed: int = 0) -> np.ndarray:
    """Samples of the Gaussians fitted to the pixels of each class: uint8 [len(wanted), 8, 8, 3]."""
    grey = np.asarray(images)[..., 0].reshape(len(images), -1).astype(np.float64)
    rng = np.random.default_rng(seed)
    out = np.empty((len(wanted), grey.shape[1]))
    for label in np.unique(wanted):
        own, rows = grey[labels == label], np.flatnonzero(wanted == label)
        covariance = np.cov(own, rowvar=False)
        out[rows] = rng.multivariate_normal(own.mean(0), covariance, len(rows), method="eigh")
    out = np.rint(out.clip(0, 255)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return np.repeat(out, 3, axis=3)


def compare(scores: DigitScores, sample, seeds=(0, 1, 2, 3, 4)) -> dict[str, dict]:
    """Rows by name, means and deviations over seeds: "model", "gaussian", "held-out", "training".

    sample(labels int64 [449], seed) -> uint8 [449, 8, 8, 3]; the labels are the reference's. Every
    set has the reference's labels: other proportions of the classes alone raise the distance of
    real images from 2 to 5. And every set has 449 images, for the distance depends on their number.
    Real images are drawn once each as far as a class has enough; "repeated" counts the others.
    """
    train, train_labels = digits("train")
    held_out, held_out_labels = digits("heldout")
    labels = scores.reference_labels

    def real(images, own, seed):
        rows, repeated = _rows_with_labels(own, labels, seed)
        return {**scores(images[rows], labels), "repeated": repeated}

    rows = {
        "model": [scores(sample(labels, seed), labels) for seed in seeds],
        "gaussian": [
            scores(gaussian_digits(train, train_labels, labels, seed), labels) for seed in seeds
        ],
        "held-out": [real(held_out, held_out_labels, seed) for seed in seeds],
        "training": [real(train, train_labels, seed) for seed in seeds],
    }
    return {name: _mean_and_sd(found) for name, found in rows.items()}


def _rows_with_labels(own, wanted, seed):
    """(int64 [N], count): rows of images of classes ``own`` [M] that have the classes ``wanted``
    [N], each row once unless a class has too few, and how many had to be repeated."""
    rng = np.random.default_rng(seed)
    rows, repeated = np.empty(len(wanted), np.int64), 0
    for label in np.unique(wanted):
        here, places = np.flatnonzero(own == label), np.flatnonzero(wanted == label)
        more = max(0, len(places) - len(here))
        picked = rng.permutation(here)[: len(places)]
        rows[places] = np.concatenate([picked, rng.choice(here, more, replace=more > len(here))])
        repeated += more
    return rows, repeated


def markdown_table(rows: dict[str, dict]) -> str:
    """The rows of ``compare`` as a table."""
    lines = [
        "| images | FD-digits | precision | recall | right class | nearest in training | copies |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        sd = f" +- {row['fd_sd']:.1f}" if "fd_sd" in row else ""
        lines.append(
            f"| {name} | {row['fd']:.1f}{sd} | {row['precision']:.3f} | {row['recall']:.3f} "
            f"| {row['accuracy']:.1%} | {row['nearest']:.0f} | {row['copies']:g} |"
        )
    return "\n".join(lines)


def _mean_and_sd(found):
    row = {name: float(np.mean([r[name] for r in found])) for name in found[0]}
    if len(found) > 1:
        row |= {f"{name}_sd": float(np.std([r[name] for r in found], ddof=1)) for name in found[0]}
    return row


@torch.no_grad()
def _classes(net, images):
    return net(_grey(images)).argmax(1).numpy()


def _grey(images):
    """uint8 [N, 8, 8, 3] -> float32 [N, 1, 8, 8] in [0, 1]."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != (8, 8, 3):
        raise ValueError(
            f"images must be uint8 [N, 8, 8, 3], got {images.dtype} {list(images.shape)}"
        )
    return torch.from_numpy(images).float().mean(3)[:, None] / 255


def _nearest(images, train):
    """Distance of each image to the nearest of ``train`` in grey levels, float64 [N]."""
    a, b = (np.asarray(x).astype(np.float64).mean(3).reshape(len(x), -1) for x in (images, train))
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2)).min(1)
