"""The sampler written in docs/add-a-sampler.md works and is of the order that the page says."""

import re
import types
from pathlib import Path

import numpy as np
import pytest

from adm_rt.samplers import SAMPLERS, Sampler

PAGE = Path(__file__).parents[2] / "docs" / "add-a-sampler.md"


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not part of this installation")
def test_worked_example(process, gaussian_engine, exact_flow):
    module, entry = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    dpmpp_1 = types.ModuleType("dpmpp_1")
    exec(module, dpmpp_1.__dict__)
    sampler = eval(entry, {"Sampler": Sampler, "dpmpp_1": dpmpp_1})
    assert sampler.name not in SAMPLERS

    x = np.linspace(-2, 2, 24).reshape(2, 3, 2, 2)
    errors = []
    for steps in (40, 80):
        diffusion = process(str(steps))
        engine = gaussian_engine(diffusion, mu=0.1, std=0.8)
        got = sampler(engine, x, diffusion, clip="none")
        abar = diffusion.alphas_cumprod
        errors.append(np.abs(got - exact_flow(x, 0.1, 0.8, abar[-1], abar[0])).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(sampler.ode_order, abs=0.2)
