"""Every command in README.md is run here, or says that it needs weights and is checked without."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adm_rt.cli import build_parser, main
from adm_rt.commands.flags import structure
from adm_rt.commands.sample import sample_arguments
from adm_rt.locate import zoo_models
from adm_rt.models.presets import preset, preset_name, sampling_settings
from adm_rt.request import respaced_diffusion

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "README.md"
WEIGHTS = "<!-- needs weights -->"


def blocks(language, text=None):
    """(needs weights, body) of each fenced block."""
    text = PAGE.read_text() if text is None else text
    pattern = rf"({re.escape(WEIGHTS)}\s*)?^```{language}\n(.*?)^```"
    return [(bool(m[1]), m[2]) for m in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)]


def commands(needs_weights):
    lines = [
        line.split("  #")[0].strip()
        for needs, body in blocks("bash")
        if needs == needs_weights
        for line in body.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


# Run by whoever runs these tests, and by the packaging tests.
ELSEWHERE = {"make sample", "make test", "pip install ."}
OWN = [line for line in commands(False) if line not in ELSEWHERE]


def test_the_page_has_what_it_must():
    text = PAGE.read_text()
    assert {"make sample", "make test", "pip install ."} <= set(commands(False))
    first_screen = "\n".join(text.splitlines()[:22])
    assert "`adm_rt/` is Python" in first_screen
    assert "`python/` is the C++ that knows Python" in first_screen
    assert len(OWN) >= 6 and len(commands(True)) >= 14
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGE.read_text()):
        assert (ROOT / target).exists(), f"README.md points at {target}"
    for name in re.findall(r"`(adm_rt/zoo/[^`]+)`", PAGE.read_text()):
        assert (ROOT / name).exists(), f"README.md names {name}"


@pytest.mark.parametrize("command", OWN)
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    if "glyphs32" in command or command.startswith("adm-rt sample"):
        assert "glyphs32" in zoo_models(), "adm_rt/zoo/glyphs32 is not in this tree"
    program, *arguments = shlex.split(command)
    assert program == "adm-rt"
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0, capsys.readouterr().err
    for flag in ("--output", "--json"):
        if flag in arguments:
            assert os.listdir() == [arguments[arguments.index(flag) + 1]]


def test_python_runs(tmp_path):
    (program,) = [body for _, body in blocks("python")]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(os.listdir(tmp_path)) == ["adm_from_python.png", "r_0.npz", "r_2.npz"]


@pytest.mark.parametrize("command", commands(True))
def test_commands_that_need_weights_are_right(command):
    program, name, *arguments = shlex.split(command)
    assert program == "adm-rt"
    args = build_parser(name).parse_args([name, *arguments])
    assert structure(args) == {}
    if name == "convert":
        assert preset_name(args.source)
        return
    cfg = preset(args.model)
    settings = sampling_settings(args.model)
    respaced_diffusion(cfg, args.steps)
    if name == "upscale":
        assert cfg.kind == "upsampler"
        assert str(args.steps) == settings.timestep_respacing
        return
    request = sample_arguments(args)
    assert cfg.kind == "diffusion"
    if args.upsampler:
        assert preset(args.upsampler).small_size == cfg.image_size
        assert sampling_settings(args.upsampler).base == preset_name(args.model)
    if args.classifier:
        assert preset_name(args.classifier) == settings.classifier
        assert request["guidance_scale"] is not None
        few = request["sampler"] == "ddim"
        published = settings.ddim_guidance_scale if few else settings.guidance_scale
        assert request["guidance_scale"] == published
        assert request["steps"] == ("ddim25" if few else int(settings.timestep_respacing))
    else:
        assert request["guidance_scale"] is None
        assert str(request["steps"]) == (settings.timestep_respacing or "1000")


def test_each_released_size_and_both_upsamplers_have_a_command():
    named = {preset_name(word) for line in commands(True) for word in shlex.split(line)}
    for name in ("64x64", "128x128", "256x256", "512x512"):
        assert {f"{name}_diffusion", f"{name}_classifier"} <= named
    assert {"64_256_upsampler", "128_512_upsampler"} <= named


def test_make_sample_is_the_documented_command():
    done = subprocess.run(
        [shutil.which("make") or "make", "-n", "sample"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"make -n sample: {done.stderr.strip()[-200:]}")
    (line,) = [x for x in done.stdout.splitlines() if "adm-rt sample" in x]
    args = build_parser("sample").parse_args(shlex.split(line)[1:])
    assert args.model == "glyphs32" and args.num_images == 16 and args.output is None


def test_a_wrong_scale_would_be_seen():
    """The check above can fail."""
    with pytest.raises(AssertionError):
        test_commands_that_need_weights_are_right(
            "adm-rt sample --model 256x256_diffusion.pt --classifier 256x256_classifier.pt "
            "--sampler ddim --steps ddim25 --guidance-scale 2.0"
        )
