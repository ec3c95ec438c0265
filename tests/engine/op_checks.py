"""One op of the native engine against float64: every instruction set, thread count, batch split."""

from typing import NamedTuple

import numpy as np

from adm_rt.ops._library import extension

C = extension()
ISAS = C.available_cpu_isas()
THREADS = (1, 2, 3, 7)


def random_array(rng, *shape, scale=1.0, shift=0.0):
    """float32 normal values."""
    return (rng.standard_normal(shape) * scale + shift).astype(np.float32)


def run(name, inputs, outputs, attributes=None, weights=None):
    """name -> [N, H, W, C]. RuntimeError when the op wrote outside of its buffers."""
    return C.run_engine_op(name, inputs, outputs, attributes or {}, weights or {})


def same_bits(a, b):
    """Whether two results agree bit for bit."""
    return all(np.array_equal(a[key].view(np.uint32), b[key].view(np.uint32)) for key in a)


class OpCase(NamedTuple):
    """One call of an op and what it has to give.

    inputs name -> [N, H, W, C]; outputs name -> (H, W, C); exact, plain name -> arrays of the
    output's size, in float64 and as torch computes them in float32.
    """

    inputs: dict
    outputs: dict
    exact: dict
    plain: dict | None = None
    attributes: dict | None = None
    weights: dict | None = None

    def run(self, name, inputs=None):
        return run(name, inputs or self.inputs, self.outputs, self.attributes, self.weights)

    def shapes(self):
        """What tells two cases apart."""
        weights = {k: v.shape for k, v in (self.weights or {}).items()}
        inputs = {k: v.shape for k, v in self.inputs.items()}
        return repr((inputs, self.outputs, weights, self.attributes))


def check_op(
    name,
    inputs,
    outputs,
    exact,
    plain=None,
    attributes=None,
    weights=None,
    *,
    slack=1e-6,
    isas=None,
    threads=THREADS,
):
    """``check_cases`` of one case."""
    case = OpCase(inputs, outputs, exact, plain, attributes, weights)
    check_cases(name, [case], slack=slack, isas=isas, threads=threads)


def check_shapes(name, make, *, count=300, seed=0, **options):
    """``check_cases`` of ``count`` different cases: ``make(rng)`` is an OpCase of random shapes.

    What is between two shapes that somebody thought of: each op has one of these tests.
    """
    print("seed", seed)
    rng = np.random.default_rng(seed)
    cases = {}
    for _ in range(4 * count):
        case = make(rng)
        cases[case.shapes()] = case
        if len(cases) == count:
            break
    assert len(cases) == count, f"only {len(cases)} different cases in {4 * count}"
    check_cases(name, list(cases.values()), **options)


def check_cases(name, cases, *, slack=1e-6, isas=None, threads=THREADS):
    """Run on every instruction set and hold the results against ``exact``.

    The largest error may be twice that of ``plain`` plus ``slack`` times the largest value. Thread
    counts and the split of the batch into images must not change a bit.
    """
    before = C.cpu_isa(), C.num_threads()
    try:
        for isa in isas or ISAS:
            C.set_cpu_isa(isa)
            C.set_num_threads(threads[0])
            results = [case.run(name) for case in cases]
            for case, result in zip(cases, results, strict=True):
                _hold(f"{name} on {isa}", case, result, slack)
            for count in threads[1:]:
                C.set_num_threads(count)
                for case, result in zip(cases, results, strict=True):
                    what = f"{name} on {isa}: {count} threads, {case.shapes()}"
                    assert same_bits(result, case.run(name)), what
            for case, result in zip(cases, results, strict=True):
                _hold_alone(f"{name} on {isa}", case, result)
    finally:
        C.set_cpu_isa(before[0])
        C.set_num_threads(before[1])


def _hold(what, case, result, slack):
    for key, value in result.items():
        wanted = np.asarray(case.exact[key], np.float64).reshape(value.shape)
        error = np.abs(value - wanted).max()
        allowed = slack * max(np.abs(wanted).max(), 1e-30)
        if case.plain is not None:
            plain = np.asarray(case.plain[key]).reshape(value.shape)
            allowed += 2 * np.abs(plain - wanted).max()
        assert error <= allowed, f"{what}: {key} errs by {error} > {allowed}, {case.shapes()}"


def _hold_alone(what, case, result):
    batch = next(iter(case.inputs.values())).shape[0]
    for i in range(batch if batch > 1 else 0):
        alone = case.run(
            name=what.split()[0], inputs={k: v[i : i + 1] for k, v in case.inputs.items()}
        )
        part = {key: value[i : i + 1] for key, value in result.items()}
        assert same_bits(alone, part), f"{what}: image {i} depends on its batch, {case.shapes()}"
