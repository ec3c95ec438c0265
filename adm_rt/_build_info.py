"""Facts about the build of the extension modules, recorded by setup.py in _build.json."""

import json
from importlib import resources


def build_info():
    """Returns a dict: version, git (commit or None), compiler, cxx_flags, and cuda with enabled,
    reason (one line: what was built or why CUDA was left out) and, when enabled, nvcc,
    nvcc_version and archs. Where nothing was built, {"error": why}.
    """
    try:
        return json.loads(resources.files("adm_rt").joinpath("_build.json").read_text())
    except (OSError, ValueError) as error:
        return {"error": f"no build facts ({error}); build with: pip install -e ."}
