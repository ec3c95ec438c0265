"""The sweep on stand-ins whose fidelity and diversity are known, and its command line."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import adm_rt
from adm_rt.data import GLYPH_CLASSES, glyphs

pytest.importorskip("torch")

from adm_rt.evaluation import guidance_sweep as sweep  # noqa: E402
from adm_rt.evaluation.judge import save_judge  # noqa: E402

LABELS = sweep.balanced_labels(144)


def stand_in(scale, labels):
    """Like guidance: a larger scale makes fewer wrong characters and fewer different images."""
    rng = np.random.default_rng(0)
    shown = np.where(
        rng.random(len(labels)) < 0.5 / (1 + scale), rng.integers(0, 36, len(labels)), labels
    )
    kinds = max(1, int(len(labels) / 36 / (1 + scale)))
    images = np.empty((len(labels), 16, 16, 3), np.uint8)
    for i, label in enumerate(shown):
        images[i] = glyphs(1, 16, seed=77, labels=int(label), first=(i // 36) % kinds)[0][0]
    return images


def test_accuracy_rises_and_recall_falls_with_the_stand_in(judge):
    calls = []

    def sampler(scale, labels):
        calls.append((scale, labels.tolist()))
        return stand_in(scale, labels)

    rows = sweep.guidance_sweep(sampler, [0, 1, 9], LABELS, judge=judge, held_out=400)
    assert calls == [(s, LABELS.tolist()) for s in (0, 1, 9)]
    assert [row["guidance_scale"] for row in rows] == [0, 1, 9, None]
    accuracy = [row["accuracy"] for row in rows]
    recall = [row["recall"] for row in rows]
    assert accuracy[0] < accuracy[1] < accuracy[2]
    assert recall[0] > recall[1] > recall[2]
    assert rows[0]["coverage"] > rows[1]["coverage"] > rows[2]["coverage"]
    floor = rows[-1]
    assert floor["frechet_distance"] == min(row["frechet_distance"] for row in rows)
    assert all(row["num_images"] == len(LABELS) for row in rows)


def test_wrong_labels_show_in_the_accuracy_alone(judge):
    images, _ = glyphs(144, 16, seed=5, labels=LABELS)
    rows = sweep.guidance_sweep(
        {0: (images, LABELS), 1: (images, np.roll(LABELS, 1))}, judge=judge, held_out=300
    )
    assert rows[0]["accuracy"] > 0.75 and rows[1]["accuracy"] < 0.1
    for name in ("frechet_distance", "precision", "recall", "coverage"):
        assert rows[0][name] == rows[1][name]


def test_the_table_is_markdown():
    row = {"accuracy": 0.9, "frechet_distance": 12.345, "precision": 0.5, "recall": 0.25}
    row["coverage"] = 0.125
    table = sweep.markdown_table(
        [{"guidance_scale": 0.5, **row}, {"guidance_scale": None, **row}]
    ).splitlines()
    assert table[2] == "| 0.5 | 90.0% | 12.35 | 0.500 | 0.250 | 0.125 |"
    assert table[3].startswith("| real glyphs (floor) |")
    assert len({line.count("|") for line in table}) == 1


@pytest.fixture
def fake_sample(monkeypatch):
    calls = []

    def sample(model, **options):
        calls.append((model, options))
        images, labels = glyphs(
            options["num_images"], 16, seed=options["seed"], labels=options["classes"]
        )
        return SimpleNamespace(images=images, labels=labels, metadata={"sampler": "ddim"})

    monkeypatch.setattr(adm_rt, "sample", sample, raising=False)
    return calls


def test_the_command_samples_each_scale_alike_and_writes_json(fake_sample, judge, tmp_path, capsys):
    cache, out = tmp_path / "judge.safetensors", tmp_path / "sweep.json"
    save_judge(judge, cache)
    arguments = ["--scales", "0,2.5", "--num-images", "72", "--steps", "5", "--seed", "3"]
    arguments += ["--held-out", "200", "--judge", str(cache), "--json", str(out)]
    rows = sweep.main(arguments)
    assert [options.pop("guidance_scale") for _, options in fake_sample] == [0, 2.5]
    assert fake_sample[0] == fake_sample[1]
    model, options = fake_sample[0]
    assert model == "glyphs32" and options["steps"] == 5 and options["seed"] == 3
    assert options["classes"] == list(range(len(GLYPH_CLASSES))) * 2
    printed = capsys.readouterr().out
    assert sweep.markdown_table(rows) in printed and "held-out glyphs" in printed
    record = json.loads(out.read_text())
    assert record["rows"] == rows and record["seed"] == 3 and record["judge"]["accuracy"] > 0.7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["judge.safetensors", "sweep.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scales", "0,nan"], "finite"),
        (["--scales", "1,1"], "distinct"),
        (["--scales", "one"], "scales='one'"),
        (["--num-images", "3"], "num_images=3"),
        (["--held-out", "0"], "held_out=0"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder"),
    ],
)
def test_bad_arguments_end_before_the_work(fake_sample, arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        sweep.main(arguments)
    assert end.value.code == 1 and not fake_sample
    assert words in capsys.readouterr().err


def test_bad_sets_are_named(judge):
    images, labels = glyphs(8, 16)
    for source, scales, given, error, words in (
        ({}, None, None, ValueError, "no guidance scale"),
        ({0: (images, labels)}, [0], None, ValueError, "leave them out"),
        (stand_in, None, labels, ValueError, "both scales and labels"),
        (3, None, None, TypeError, "int"),
        ({0: (images / 255.0, labels)}, None, None, ValueError, "uint8"),
        ({0: (images, labels[:3])}, None, None, ValueError, "3 labels"),
        ({0: (images, labels), 1: (images[:4], labels[:4])}, None, None, ValueError, "one shape"),
    ):
        with pytest.raises(error, match=words):
            sweep.guidance_sweep(source, scales, given, judge=judge)
