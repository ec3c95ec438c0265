"""docs/training.md: its Python runs as it is written, its commands parse, its flags are there."""

import re
import shlex
from pathlib import Path

import pytest

from adm_rt.cli import build_parser

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("block", [body for kind, body in BLOCKS if kind == "python"])
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {}
    exec(compile(block, "training.md", "exec"), values)
    if "final" in values:
        assert (tmp_path / values["final"] / "model.safetensors").is_file()
    if "weights" in values:
        assert "label_emb.weight" in values["weights"]


def test_commands_parse():
    text = "".join(body for kind, body in BLOCKS if kind == "bash").replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line]
    assert len(lines) >= 6
    for program, command, *arguments in lines:
        assert program == "adm-rt"
        build_parser(command).parse_args([command, *arguments])


def test_flags_that_are_named_are_there(capsys):
    with pytest.raises(SystemExit):
        build_parser("train").parse_args(["train", "diffusion", "--help"])
    known = capsys.readouterr().out
    with pytest.raises(SystemExit):
        build_parser("train").parse_args(["train", "classifier", "--help"])
    known += capsys.readouterr().out
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)
    elsewhere = {
        "--cfg-scale",
        "--classifier",
        "--nproc_per_node",
        "--timestep-respacing",
        "--timestep_respacing",  # of which the page says that it is refused
        "--noised",
        "--help",
    }
    for flag in set(re.findall(r"`(--[\w-]+)", prose)) - elsewhere:
        assert re.search(rf"{flag}\b", known), flag
