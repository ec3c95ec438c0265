"""docs/import-released-weights.md: its commands run, on stand-ins of the released files."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from adm_rt import cli, models
from adm_rt.models import ModelConfig
from adm_rt.models.checkpoint import load_model
from adm_rt.models.presets import PRESETS, sampling_settings

PAGE = Path(__file__).parents[2] / "docs" / "import-released-weights.md"


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("adm-rt ")]


def test_the_page_has_commands():
    assert len(commands()) >= 7


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """The released files' names, with small networks of the same kinds in them."""
    small = dict(num_channels=32, channel_mult="1,1,1,1", num_res_blocks=1)
    tiny = {
        "64x64_diffusion": PRESETS["64x64_diffusion"].replace(num_head_channels=32, **small),
        "64x64_classifier": ModelConfig.classifier(
            64, 32, 1, channel_mult="1,1,1,1", num_head_channels=32, noise_schedule="cosine"
        ),
    }
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, cfg in tiny.items():
        monkeypatch.setitem(PRESETS, name, cfg)
        torch.save(models.build(cfg).state_dict(), f"{name}.pt")
    own = tiny["64x64_diffusion"].replace(num_head_channels=64, num_channels=64)
    torch.save(models.build(own).state_dict(), "ema_0.9999_500000.pt")
    return tiny


def test_the_commands_run(stand_ins, capsys):
    for line in commands():
        argv = shlex.split(line)[1:]
        if argv[0] == "sample":
            cli.build_parser("sample").parse_args(argv)  # sampling has its own tests
        else:
            assert cli.main(argv) == 0, (line, capsys.readouterr().err)
    assert load_model("models/adm64").cfg == stand_ins["64x64_diffusion"]
    assert load_model("models/adm64_classifier").info.dtype == "float16"
    assert load_model("models/mine").cfg.num_head_channels == 64
    first, second = (torch.load(f, weights_only=True) for f in ("64x64_diffusion.pt", "adm64.pt"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_table_is_the_published_settings():
    rows = re.findall(r"^\| `(\S+)`.*?\| (.*?) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.M)
    seen = set()
    for name, classifier, many, few in rows:
        settings = sampling_settings(name)
        seen.add(name)
        assert classifier == (f"`{settings.classifier}`" if settings.classifier else "none")
        if settings.guidance_scale is None:
            assert "unguided" in many
        else:
            assert float(many.split(";")[0]) == settings.guidance_scale
        if settings.ddim_guidance_scale is not None:
            assert float(few) == settings.ddim_guidance_scale
        else:
            assert few in ("not published", "unguided")
    assert len(seen) == 8
