"""One small judge for all tests of the evaluation: 16 px glyphs, about two seconds to train."""

import pytest


@pytest.fixture(scope="session")
def judge():
    pytest.importorskip("torch", reason="the judge is a torch network")
    from adm_rt.evaluation import train_judge

    return train_judge(steps=200, batch_size=64, width=12, image_size=16, learning_rate=5e-3)
