"""The Python of the data half of docs/train-on-your-images.md runs as it is written."""

import re
from pathlib import Path

from data_files import write_folder

PAGE = Path(__file__).parents[2] / "docs" / "train-on-your-images.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    section = re.search(r"^## Data\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)[1]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert len(blocks) >= 3
    write_folder(tmp_path / "photos", [f"{kind}/{i}.png" for kind in "ab" for i in range(5)])
    monkeypatch.chdir(tmp_path)
    found = {}
    for block in blocks:
        values = {}
        exec(compile(block, str(PAGE), "exec"), values)
        found |= values
        if "stream" in values:
            assert values["first"] == 2 and values["images"].shape == (3, 3, 64, 64)
            values["stream"].close()
    assert found["data"].get(7)[1] == 3
    assert "10 images, 2 classes" in capsys.readouterr().out
