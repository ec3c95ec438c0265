"""Every op of the native engine has its test over many shapes."""

import re
from pathlib import Path

from op_checks import C

FOLDER = Path(__file__).parent
# Its own tests visit more than 700 shapes, all edges of tiles among them.
ELSEWHERE = {"conv3x3"}


def test_every_op_is_checked_over_many_shapes():
    sources = "".join(file.read_text() for file in FOLDER.glob("test_*.py"))
    checked = set(re.findall(r'check_shapes\(\s*"(\w+)"', sources)) | ELSEWHERE
    assert set(C.engine_ops()) == checked
