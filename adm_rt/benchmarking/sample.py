"""``adm-rt bench sample``: our engines against eager PyTorch and other runtimes.

Every contender is a process of its own with the same weights, inputs, cores and allocator
settings. Outputs are compared with those of the eager published code first; then requests are
timed one at a time, each after one of its own that does not count, in rounds whose order
alternates. Nothing here imports torch. On a GPU it is ``cuda_sample``.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adm_rt.benchmarking import contenders, machine, sampling_cases
from adm_rt.benchmarking.contenders import CONTENDERS, OURS, Setup
from adm_rt.benchmarking.worker import Worker, WorkerError
from adm_rt.engines.memory import free_memory

# Relative to the largest value of eager PyTorch's output; of images, the share of values that may
# differ by more than one of 255 levels.
MAX_ERROR, MAX_SHARE = 1e-3, 1e-3
_SAMPLE_SECONDS = 0.2  # a sample repeats short requests until it lasts about this long
_PROCESS_BYTES = 400 << 20  # interpreter and libraries


class Errors(NamedTuple):
    """Of a result against another: largest and root mean square, relative; share of values."""

    maximum: float
    rms: float
    beyond_one_level: float | None = None  # of 8-bit images


def rows(args):
    """Measure, printing as it goes; None after --list. ``args.failures``: what of ours failed."""
    if args.device == "cuda":
        from adm_rt.benchmarking import cuda_sample

        return cuda_sample.rows(args)
    args.failures = []
    cases = select(args)
    if args.list:
        return _list(cases, args)
    names = _participants(args)
    _say(
        f"{machine.processor()}, {args.thread_count} thread(s) on cores {args.core_list}, "
        f"{args.clock} clock, "
        f"{', '.join(f'{k} {v}' for k, v in machine.versions().items())}"
    )
    result = []
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="adm_rt_"))
        for name in dict.fromkeys(case.model for case in cases):
            mine = [case for case in cases if case.model == name]
            result += _model_rows(sampling_cases.MODELS[name], mine, names, Path(folder), args)
    if args.chart and result:
        from adm_rt.benchmarking import chart

        chart.draw(result, args.chart)
        _say(f"chart -> {args.chart}")
    return result


def select(args):
    """The cases that the command line asks for; ValueError for none."""
    cases = sampling_cases.CASES
    if args.only:
        cases = [c for c in cases if args.only in f"{c.name} {c.batch}"]
    elif not args.all and not args.list:
        cases = [c for c in cases if c.default]
    if not cases:
        known = "; ".join(f"{c.name} {c.batch}" for c in sampling_cases.CASES)
        raise ValueError(f"--only {args.only!r} is part of no case; there are: {known}")
    return list(cases)


def errors(result, expected):
    """``Errors`` of arrays of one shape; 8-bit images on the scale of their 255 levels."""
    if result.shape != expected.shape:
        raise ValueError(f"the output has shape {result.shape}, expected {expected.shape}")
    images = expected.dtype == np.uint8
    result, expected = result.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(result - expected)
    largest = 255.0 if images else np.abs(expected).max()
    scale = 255.0 if images else np.sqrt(np.square(expected).mean())
    return Errors(
        float(difference.max() / largest),
        float(np.sqrt(np.square(difference).mean()) / scale),
        float((difference > 1).mean()) if images else None,
    )


def groups(names, ours, need, available):
    """Names in groups that fit into ``available`` bytes; eager and ours are in each.

    need: name -> bytes. Returns (groups, names that fit nowhere).
    """
    anchors = ["eager", *([ours] if ours else [])]
    base = sum(need[name] for name in anchors)
    result, left_out, room = [list(anchors)], [], available - base
    if room < 0:
        return [], list(names)
    free = room
    for name in (n for n in names if n not in anchors):
        if need[name] > room:
            left_out.append(name)
            continue
        if need[name] > free:
            result.append(list(anchors))
            free = room
        result[-1].append(name)
        free -= need[name]
    return result, left_out


# ---- who ----


def _participants(args):
    table = CONTENDERS[args.device]
    asked = [name for name in args.contenders.split(",") if name]
    unknown = [name for name in asked if name not in table]
    if unknown:
        raise ValueError(f"--contenders {unknown[0]}: known are {', '.join(table)}")
    names = []
    for name, entry in table.items():
        if name != "eager" and asked and name not in asked:
            continue
        if not asked and not entry.default:
            _say(f"{name}: left out unless asked for by --contenders")
            continue
        why = contenders.missing(name, args.device)
        if why is None:
            names.append(name)
        elif name == "eager":
            raise ImportError(f"bench sample compares with eager PyTorch: {why}")
        else:
            _say(f"{name}: left out: {why}")
    return names


def _needs(model, cases, device):
    """name -> bytes of memory."""
    working = sampling_cases.working_bytes(model, max(case.batch for case in cases))
    weights = sampling_cases.weight_bytes(model)
    return {
        name: int(entry.copies * weights + entry.maps * working) + _PROCESS_BYTES
        for name, entry in CONTENDERS[device].items()
    }


def _list(cases, args):
    ours = next(name for name in OURS if name in CONTENDERS[args.device])
    for case in cases:
        model = sampling_cases.MODELS[case.model]
        need = _needs(model, [case], args.device)
        least = sum(need[name] for name in ("eager", ours))
        when = "" if case.default else "  (--all or --only)"
        print(
            f"{case.name} {case.batch}: {case.sizes(model)}; memory about {_gb(least)} for eager "
            f"and {ours}, {_gb(sum(need.values()))} for all at once{when}"
        )


# ---- one model ----


def _model_rows(model, cases, names, folder, args):
    need = _needs(model, cases, args.device)
    available = int(0.9 * free_memory())
    ours = next((name for name in OURS if name in names), None)
    parts, left_out = groups(names, ours, need, available)
    for name in left_out:
        _say(f"{name}: left out of {model.name}: about {_gb(need[name])} do not fit beside the "
             f"others into {_gb(available)}")  # fmt: skip
    if not parts:
        args.failures.append(f"{model.name}: not enough memory")
        return []
    biggest = max(sum(need[name] for name in part) for part in parts)
    _say(f"{model.name}: {_gb(sampling_cases.weight_bytes(model))} of weights; about "
         f"{_gb(biggest)} of memory, {_gb(available)} are free")  # fmt: skip
    folders = {part: str(path) for part, path in sampling_cases.prepare(model, folder).items()}
    graphs = {}
    if any(CONTENDERS[args.device][name].exports for name in names):
        graphs = _graphs(model, cases, folders, folder, args)
    result = []
    for part in parts:
        part = [n for n in part if graphs is not None or not CONTENDERS[args.device][n].exports]
        with contextlib.ExitStack() as stack:
            setup = Setup(folders, graphs or {}, args.thread_count)
            workers = _start(part, setup, folder / "packed", stack, args)
            for case in cases:
                result += _case_rows(model, case, workers, folders, args)
    return result


def _graphs(model, cases, folders, folder, args):
    """part -> ONNX file, made unless there; None when they cannot be made."""
    wanted = {"diffusion"} if any(c.kind != "gradient" for c in cases) else set()
    if any(c.kind != "forward" for c in cases):
        wanted.add("classifier")
    files = {}
    for part in sorted(wanted):
        place = Path(folder) / model.name / f"onnx_{part}"
        done = place / "complete"
        files[part] = str(place / "graph.onnx")
        if done.exists() and model.zoo is None:
            continue
        begin = time.perf_counter()
        try:
            with Worker("export", args.core_list, args.isa) as worker:
                worker.call("export", part, folders[part], files[part])
        except WorkerError as error:
            _say(f"{error}; what needs the graph is left out")
            return None
        done.touch()
        _say(f"  {part}: exported to ONNX in {time.perf_counter() - begin:.0f} s")
    return files


def _start(names, setup, cache, stack, args):
    """name -> Worker with its contender loaded; those that fail are left out with the reason."""
    workers = {}
    for name in names:
        begin = time.perf_counter()
        worker = stack.enter_context(Worker(name, args.core_list, args.isa, cache))
        try:
            worker.call("load", CONTENDERS[args.device][name].factory, setup)
        except WorkerError as error:
            _failed(name, str(error), args)
            worker.close()
            continue
        workers[name] = worker
        _say(f"  {name}: loaded in {time.perf_counter() - begin:.1f} s")
    return workers


def _failed(name, text, args):
    if name == "eager":
        raise WorkerError(text)
    if name in OURS:
        args.failures.append(text)
    _say(f"  {text}; left out")


# ---- one case ----


def _case_rows(model, case, workers, folders, args):
    cfg, arrays = sampling_cases.configs(model)["diffusion"], sampling_cases.inputs(model, case)
    work = case.kind, cfg, arrays, model.guidance_scale
    exact = _exact(case, cfg, arrays, folders, args) if args.float64 else None
    outputs, repeats = {}, {}
    for name, worker in workers.items():
        try:
            outputs[name] = worker.call("prepare", *work)
            _check(name, outputs[name], outputs["eager"])
            once = worker.call("sample", 1, args.clock, False)
        except WorkerError as error:
            _failed(name, f"{case.name}: {error}", args)
            outputs.pop(name, None)
            continue
        repeats[name] = int(min(100, max(1, round(_SAMPLE_SECONDS / max(once, 1e-6)))))
    racing = {name: workers[name] for name in repeats}
    before = {name: worker.call("usage") for name, worker in racing.items()}
    warm = case.kind != "sample"  # which is many steps already
    samples = _race(racing, repeats, args, warm)
    usage = {name: worker.call("usage") for name, worker in racing.items()}
    measured = {}
    for name in racing:
        faults = usage[name]["faults"] - before[name]["faults"]
        measured[name] = {
            "ms": 1e3 * statistics.median(samples[name]),
            "min_ms": 1e3 * min(samples[name]),
            "errors": errors(outputs[name], outputs["eager"]),
            "exact": None if exact is None else errors(outputs[name], exact),
            "memory_mb": usage[name]["peak_mb"],
            "faults": faults / ((repeats[name] + warm) * args.rounds),
            "isa": usage[name]["isa"],
            "limited": usage[name]["limited"],
        }
    _table(model, case, measured)
    return _rows(model, case, measured, args)


def _check(name, output, expected):
    """WorkerError for a result that is too far from eager PyTorch's to be timed."""
    found = errors(output, expected)
    if found.beyond_one_level is None:
        good = found.maximum <= MAX_ERROR
    else:
        good = found.beyond_one_level <= MAX_SHARE
    if not good:
        share = found.beyond_one_level
        text = f"{found.maximum:.3g}" if share is None else f"more than a level at {share:.2%}"
        raise WorkerError(f"{name}: differs from eager PyTorch by {text}: not timed")


def _exact(case, cfg, arrays, folders, args):
    if case.kind not in ("forward", "gradient"):
        return None
    with Worker("float64", args.core_list) as worker:
        return worker.call("exact", case.kind, cfg, arrays, folders)


def _race(workers, repeats, args, warm):
    """name -> seconds per request of each round."""
    samples = {name: [] for name in workers}
    for turn in range(args.rounds):
        for name in list(workers) if turn % 2 == 0 else reversed(list(workers)):
            if args.thread_count > 1:
                time.sleep(0.05)  # the threads of the one before have stopped spinning
            samples[name].append(workers[name].call("sample", repeats[name], args.clock, warm))
    return samples


def _table(model, case, measured):
    print(f"{case.name}, {case.sizes(model)}")
    eager = measured["eager"]["ms"]
    for name, m in measured.items():
        level = m["errors"].beyond_one_level
        text = "" if level is None else f", {level:.3%} beyond a level"
        if m["exact"] is not None:
            text += f"; against float64 {m['exact'].maximum:.1e} max {m['exact'].rms:.1e} rms"
        print(
            f"  {name:12s} {m['ms']:10.2f} ms ({m['min_ms']:10.2f})  {eager / m['ms']:5.2f}x  "
            f"error {m['errors'].maximum:.1e} max {m['errors'].rms:.1e} rms{text}; "
            f"{m['memory_mb']} MB, {m['faults']:.0f} page faults",
            flush=True,
        )


def _rows(model, case, measured, args):
    """Ours against each of the others."""
    ours = next((name for name in OURS if name in measured), None)
    if ours is None:
        return []
    about = {
        "threads": args.thread_count,
        "cores": args.core_list,
        "rounds": args.rounds,
        "clock": args.clock,
        "processor": machine.processor(),
        "isa": measured[ours]["isa"],
        "isa_limit": args.isa,
        "isa_limit_by_cpuid": all(m["limited"] for m in measured.values()),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
    mine = measured[ours]
    result = []
    for name, other in measured.items():
        if name == ours:
            continue
        row = {
            "name": case.name,
            "sizes": case.sizes(model),
            "device": args.device,
            "ours_ms": mine["ms"],
            "baseline_ms": other["ms"],
            "ratio": other["ms"] / mine["ms"],
            "max_error": mine["errors"].maximum,
            "ours": ours,
            "baseline": name,
            "ours_min_ms": mine["min_ms"],
            "baseline_min_ms": other["min_ms"],
            "rms_error": mine["errors"].rms,
            "baseline_max_error": other["errors"].maximum,
            "baseline_rms_error": other["errors"].rms,
            "ours_memory_mb": mine["memory_mb"],
            "baseline_memory_mb": other["memory_mb"],
        }
        if mine["errors"].beyond_one_level is not None:
            row["beyond_one_level"] = mine["errors"].beyond_one_level
        if mine["exact"] is not None:
            row["float64"] = {
                "max_error": mine["exact"].maximum,
                "rms_error": mine["exact"].rms,
                "baseline_max_error": other["exact"].maximum,
                "baseline_rms_error": other["exact"].rms,
            }
        result.append({**row, **about})
    return result


def _gb(count):
    return f"{count / 1e9:.1f} GB"


def _say(text):
    print(text, flush=True)
