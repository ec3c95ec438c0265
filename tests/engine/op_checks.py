"""One op of the native engine against float64: every instruction set, thread count, batch split."""

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
    """Run on every instruction set and hold the results against ``exact``.

    inputs name -> [N, H, W, C]; outputs name -> (H, W, C); exact, plain name -> arrays of the
    output's size, in float64 and as torch computes them in float32. The largest error may be twice
    that of ``plain`` plus ``slack`` times the largest value. Thread counts and the split of the
    batch into images must not change a bit.
    """
    before = C.cpu_isa(), C.num_threads()
    arguments = outputs, attributes, weights
    batch = next(iter(inputs.values())).shape[0]
    try:
        for isa in isas or ISAS:
            C.set_cpu_isa(isa)
            C.set_num_threads(threads[0])
            result = run(name, inputs, *arguments)
            for key, value in result.items():
                wanted = np.asarray(exact[key], np.float64).reshape(value.shape)
                error = np.abs(value - wanted).max()
                allowed = slack * max(np.abs(wanted).max(), 1e-30)
                if plain is not None:
                    torch_error = np.abs(np.asarray(plain[key]).reshape(value.shape) - wanted).max()
                    allowed += 2 * torch_error
                shapes = {k: v.shape for k, v in inputs.items()}
                assert error <= allowed, f"{name} {key} on {isa}: {error} > {allowed}, {shapes}"
            for count in threads[1:]:
                C.set_num_threads(count)
                assert same_bits(result, run(name, inputs, *arguments)), f"{isa}, {count} threads"
            if batch > 1:
                for i in range(batch):
                    one = {key: value[i : i + 1] for key, value in inputs.items()}
                    alone = run(name, one, *arguments)
                    part = {key: value[i : i + 1] for key, value in result.items()}
                    assert same_bits(alone, part), f"{isa}: image {i} depends on its batch"
    finally:
        C.set_cpu_isa(before[0])
        C.set_num_threads(before[1])
