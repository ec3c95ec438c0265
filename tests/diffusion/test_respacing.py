"""Kept timesteps against a stored table of the published rule (see make_respacing_table.py)."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from adm_rt.diffusion import Diffusion, ddim_step_counts, respaced_timesteps

TABLE = json.loads(Path(__file__).with_name("respacing_table.json").read_text())


def digest(kept):
    return hashlib.sha256(",".join(str(int(t)) for t in kept).encode()).hexdigest()[:16]


def test_every_count_equals_the_published_rule():
    plain = [str(n) for n in range(1, 1001)]
    assert set(plain) <= TABLE["digest"].keys()
    wrong = [n for n in plain if digest(respaced_timesteps(1000, n)) != TABLE["digest"][n]]
    assert not wrong


def test_sections_and_strides_equal_the_published_rule():
    texts = [text for text in TABLE["digest"] if not text.isdigit()]
    assert sum(text.startswith("ddim") for text in texts) == 62 and len(texts) > 68
    wrong = [t for t in texts if digest(respaced_timesteps(1000, t)) != TABLE["digest"][t]]
    assert not wrong


@pytest.mark.parametrize("text", sorted(TABLE["kept"]))
def test_full_lists(text):
    kept = respaced_timesteps(1000, text)
    assert kept.dtype == np.int64
    assert kept.tolist() == TABLE["kept"][text]


def test_known_values():
    kept = respaced_timesteps(1000, "25").tolist()
    assert kept[:4] == [0, 42, 83, 125] and kept[-2:] == [957, 999]
    assert respaced_timesteps(1000, "10").tolist()[:2] == [0, 111]
    assert respaced_timesteps(1000, "250").tolist()[-2:] == [995, 999]
    assert respaced_timesteps(1000, "ddim25").tolist() == list(range(0, 961, 40))
    assert respaced_timesteps(1000, "").tolist() == list(range(1000))
    assert respaced_timesteps(1000, 25).tolist() == kept
    sections = respaced_timesteps(1000, "90,60,60,20,20")
    assert [int(((sections >= a) & (sections < a + 200)).sum()) for a in range(0, 1000, 200)] == [
        90,
        60,
        60,
        20,
        20,
    ]


def test_possible_ddim_counts():
    few = [38, 39, 40, 42, 44, 46, 48, 50, 53, 56, 59, 63, 67, 72, 77, 84, 91, 100, 112, 125, 143]
    many = [167, 200, 250, 334, 500, 1000]
    assert ddim_step_counts(1000) == [*range(2, 37), *few, *many]


@pytest.mark.parametrize("steps", [2, 3, 10, 999, 4000])
def test_shape_of_other_processes(steps):
    for count in {1, 2, steps // 2, steps - 1, steps}:
        kept = respaced_timesteps(steps, str(count))
        assert len(kept) == count and np.all(np.diff(kept) > 0)
        assert kept[0] == 0 and (count == 1 or kept[-1] == steps - 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "Nearest valid: '1'"),
        ("-5", "Nearest valid: '1'"),
        ("1001", "Nearest valid: '1000'"),
        ("ddim37", "'ddim36' or 'ddim38'"),
        ("ddim0", "'ddim2'"),
        ("ddim1", "'ddim2'"),
        ("ddim1001", "'ddim1000'"),
        ("ddim-4", "'ddim2'"),
        ("ddim", "ddim25"),
        ("ddimx", "ddim25"),
        ("abc", "'25'"),
        ("2.5", "'25'"),
        ("10,,3", "'25'"),
        ("900,300", "Nearest valid: '500,300'"),
        ("5,0", "Nearest valid: '5,1'"),
        ("10,0", "Nearest valid: '10,1'"),
        ("600,0,700", "Nearest valid: '334,1,333'"),
        (",".join(["1"] * 1001), "1001 sections"),
    ],
)
def test_bad_strings_name_the_way_out(text, says):
    with pytest.raises(ValueError, match="timestep_respacing=") as error:
        Diffusion(timestep_respacing=text)
    assert says in str(error.value)
    for named in re.findall(r"Nearest valid: ('.+?')\.", str(error.value)):
        respaced_timesteps(1000, named.strip("'"))


@pytest.mark.parametrize("value", [None, 2.5, True, ["25"]])
def test_bad_types(value):
    with pytest.raises(TypeError, match="timestep_respacing"):
        Diffusion(timestep_respacing=value)
