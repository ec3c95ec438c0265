"""docs/tensorrt.md: its commands parse, and its facts are those of the code."""

import re
import shlex
from pathlib import Path

import pytest

from adm_rt.cli import build_parser
from adm_rt.engines import tensorrt_adapter, tensorrt_plugins
from adm_rt.engines.tensorrt_builder import DEFAULT_PROFILE

PAGE = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("adm-rt ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    arguments = shlex.split(command)[1:]
    build_parser(arguments[0]).parse_args(arguments)


def test_facts():
    assert len(COMMANDS) >= 5
    assert tensorrt_adapter.INSTALL in PAGE
    assert tensorrt_adapter.MODULE_VARIABLE in PAGE
    assert f"`--batch {DEFAULT_PROFILE}`" in PAGE
    assert tensorrt_plugins.LIBRARY.name in PAGE
    oldest = ".".join(map(str, tensorrt_adapter.OLDEST["tensorrt"]))
    assert f"`tensorrt` {oldest} and newer" in PAGE
