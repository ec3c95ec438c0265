"""Where a native plan's time goes: one row per op and shape. Nothing here imports torch."""

from __future__ import annotations

import statistics

import numpy as np

from adm_rt.benchmarking import machine, sampling_cases
from adm_rt.locate import locate
from adm_rt.models.presets import PRESETS
from adm_rt.models.weight_folder import read_weights
from adm_rt.ops._library import extension

NONE = "none"


def rows(args):
    """The plan of ``args.model`` at each batch size, printing as it goes.

    A row sums the ops of one kind and shape over the network: ours_ms (the sum of each op's median
    over the rounds), count, share of the whole plan, and gflops: those of the direct algorithm per
    second, so that a Winograd convolution may exceed the processor's peak. Nothing is compared
    here: baseline_ms, ratio and max_error are None.
    """
    wanted = {op for op in extension().engine_ops() if args.only in _name(op)}
    if args.model == NONE or not wanted:
        return []
    cfg, weights = _model(args.model)
    plan, blob = _packed(cfg, weights)
    del weights
    result = []
    for batch in args.batches:
        seconds = _seconds(plan, blob, batch, args.rounds)
        result += _table(args, plan, batch, seconds, wanted)
    return result


def _name(op):
    return f"plan {op}"


def _model(name):
    """(ModelConfig, weights): of a released model's shape with random weights, or at hand."""
    if name in PRESETS:
        cfg = PRESETS[name]
        return cfg, sampling_cases.random_weights(cfg)
    return read_weights(locate(name, "model"))


def _packed(cfg, weights):
    lowered = _lower(cfg)
    blob = extension().PackedWeights(lowered.plan.packed_bytes)
    lowered.pack(weights, blob, extension().num_threads())
    return lowered.plan, blob


def _lower(cfg):
    """The denoiser's plan, or that of a classifier's gradient; without the small embedding plan."""
    if cfg.kind == "classifier":
        from adm_rt.engines.lowering_classifier import lower_classifier_gradient

        return lower_classifier_gradient(cfg)
    from adm_rt.engines.lowering import lower_unet

    return lower_unet(cfg)


def _seconds(plan, blob, batch, rounds):
    """Median seconds of each op, in the order of the plan."""
    rng = np.random.default_rng(0)

    def arrays(ids, make):
        return {name: make((batch, *plan.shape(i))) for name, i in ids.items()}

    inputs = arrays(plan.inputs, lambda shape: rng.standard_normal(shape, dtype=np.float32))
    if "y" in inputs:
        inputs["y"][:] = 0  # a class
    outputs = arrays(plan.outputs, lambda shape: np.empty(shape, np.float32))
    runs = [plan.run(batch, inputs, outputs, blob, profile=True) for _ in range(rounds + 1)]
    return [statistics.median(times) for times in zip(*runs[1:])]  # the first one warms up


def _table(args, plan, batch, seconds, wanted):
    total = sum(seconds)
    print(f"native plan of {args.model}, batch {batch}: {len(plan)} ops, {total * 1e3:.1f} ms, "
          f"packed weights {plan.packed_bytes / 1e6:.0f} MB, "
          f"arena {plan.arena_bytes(batch) / 1e6:.0f} MB")  # fmt: skip
    sums = {}
    for info, time in zip(plan.ops(), seconds):
        entry = sums.setdefault((info["op"], info["shapes"]), [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += time
        entry[2] += info["flops"] * batch
    result = []
    for (op, shapes), (count, time, flops) in sorted(sums.items(), key=lambda x: -x[1][1]):
        if op not in wanted:
            continue
        row = {
            "name": _name(op),
            "sizes": f"{args.model} batch {batch}: {shapes}",
            "device": args.device,
            "ours_ms": time * 1e3,
            "baseline_ms": None,
            "ratio": None,
            "max_error": None,
            "count": count,
            "share": time / total,
            "gflops": flops / time / 1e9 if time > 0 else 0.0,
            "processor": machine.processor(),
            "isa": machine.isa(),
            "threads": extension().num_threads(),
            "rounds": args.rounds,
            "versions": machine.versions(),
            "commit": machine.commit(),
        }
        result.append(row)
        print(
            f"  {op:22s} {shapes:46s} {count:3d} x {time * 1e3 / count:9.3f} ms "
            f"{row['share']:6.1%} {row['gflops']:8.1f} GFLOP/s",
            flush=True,
        )
    return result
