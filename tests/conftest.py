"""What all tests share: Ctrl-C's handler, and pipelines of tiny random networks."""

import signal

import pytest
from tiny_models import TINY_CLASSES, tiny_network

# A shell's background job and some CI ignore SIGINT, and Python then installs no handler; the
# children of this process get the default again through this one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_pipeline():
    """A guided pipeline without an upsampler. Treat it as read-only."""
    from adm_rt import Pipeline

    return Pipeline(
        tiny_network(),
        tiny_network("classifier", seed=1),
        name="tiny",
        settings={"guidance_scale": 2.0, "class_names": list(TINY_CLASSES)},
    )


@pytest.fixture(scope="session")
def tiny_stack():
    """A guided pipeline with an upsampler. Treat it as read-only."""
    from adm_rt import Pipeline

    return Pipeline(
        tiny_network(),
        tiny_network("classifier", seed=1),
        tiny_network("upsampler", seed=2),
        name="tiny",
        settings={"guidance_scale": 2.0, "class_names": list(TINY_CLASSES)},
    )


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline, tmp_path_factory):
    """``tiny_pipeline`` on disk. Do not write into it."""
    return tiny_pipeline.save_pretrained(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_upsampler_folder(tmp_path_factory):
    """An upsampler 16 -> 32 on disk. Do not write into it."""
    from adm_rt.models import save_model

    folder = tmp_path_factory.mktemp("models") / "tiny_upsampler"
    return save_model(folder, tiny_network("upsampler", seed=2))
