"""TensorRT for real, as far as it goes without a GPU: TensorRT-RTX parses and builds our graphs.

It measures nothing while it builds, so it needs no driver. What it builds is not run here.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_network

from adm_rt.engines import tensorrt_plugins

ROOT = Path(__file__).parents[2]
TIMEOUT = 900  # seconds for all engines of a process; it takes 35 on an idle core
REASON = "tensorrt_rtx is not installed: pip install 'adm_rt[test-tensorrt]'"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason=REASON),
    pytest.mark.slow,
]

# With this version plugins are known to build: an exception is an error there, not a refusal.
TAKES_PLUGINS = "1.7.1.116"

# (network, dtype, batch profile)
CASES = [
    (network, dtype, profile)
    for network in ("unet", "classifier_gradient")
    for dtype in ("float32", "float16", "bfloat16")
    for profile in ("1,4,8", "4")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """dtype -> ExportManifest of one small model and its classifier."""
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'adm_rt[onnx]'")
    from adm_rt.export import export_model
    from adm_rt.export.manifest import read_manifest

    networks = tiny_network(), tiny_network("classifier", seed=1)
    base, made = tmp_path_factory.mktemp("exported"), {}
    for dtype in ("float32", "float16", "bfloat16"):
        export_model(networks[0], base / dtype, networks[1], dtype=dtype)
        made[dtype] = read_manifest(base / dtype)
    return made


# What the adapter asks of a module beside what a build shows: TensorRT needs a GPU to run engines.
NAMES = {
    "IBuilderConfig": "set_memory_pool_limit create_timing_cache set_timing_cache",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_profile_shape "
    "device_memory_size_v2 refittable serialize create_execution_context",
    "IExecutionContext": "set_device_memory set_input_shape set_tensor_address execute_async_v3 "
    "is_stream_capturable",
    "Refitter": "get_missing_weights refit_cuda_engine",
    "OnnxParserRefitter": "refit_from_file num_errors get_error",
    "IPluginRegistry": "get_creator register_creator deregister_creator load_library",
    "ITimingCache": "serialize",
    "TensorIOMode": "INPUT OUTPUT",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
    "MemoryPoolType": "WORKSPACE",
    "BuilderFlag": "TF32 REFIT REQUIRE_USER_ALLOCATION",
}


def test_the_module_has_the_names_that_its_fake_has():
    program = (
        "import json, sys, tensorrt_rtx as trt\n"
        "print([f'{c}.{n}' for c, names in json.loads(sys.argv[1]).items() "
        "for n in names.split() if not hasattr(getattr(trt, c, None), n)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(NAMES)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


def run(ops, folders, **environment):
    """(returncode, reports, stderr) of rtx_build.py."""
    arguments = []
    for network, dtype, profile in CASES:
        arguments += [str(getattr(folders[dtype], network).path), profile]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("rtx_build.py")), ops, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    lines = done.stdout.splitlines()
    reports = [json.loads(line) for line in lines if line.startswith("{")]
    assert done.returncode or lines[-1] == "done", done.stderr
    return done.returncode, dict(zip(CASES, reports)), done.stderr


@pytest.fixture(scope="module")
def functions(folders):
    status, reports, text = run("functions", folders)
    assert status == 0, f"after {len(reports)} of {len(CASES)} engines: {text}"
    return reports


@pytest.fixture(scope="module")
def loader_path(tmp_path_factory):
    """LD_LIBRARY_PATH with which TensorRT-RTX loads plugins."""
    # TensorRT-RTX does not support plugins; its loader looks for a library name that the wheel has
    # with a version behind it, and ends the process when there is none. A name in a folder of this
    # process's own serves it. Only for this test: it shows that our plugins parse and build.
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None:
        pytest.skip("tensorrt_rtx has its libraries somewhere else than in tensorrt_rtx_libs")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*"))
    if not found:
        pytest.skip("tensorrt_rtx_libs has no libtensorrt_rtx.so.*")
    folder = tmp_path_factory.mktemp("names")
    (folder / "libtensorrt_rtx.so").symlink_to(found[0])
    return os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])


def with_plugins(ops, folders, loader_path):
    status, reports, text = run(ops, folders, LD_LIBRARY_PATH=loader_path)
    if status:
        last = " ".join(text.split()[-30:])
        why = f"status {status} after {len(reports)} of {len(CASES)} engines: {last}"
        if status > 0 and importlib.metadata.version("tensorrt_rtx") == TAKES_PLUGINS:
            pytest.fail(why)
        pytest.skip(f"TensorRT-RTX, which does not support plugins, ended with {why}")
    return reports


@pytest.fixture(scope="module")
def plugins(folders, loader_path):
    return with_plugins("plugins", folders, loader_path)


def nodes(folders, network, dtype):
    counts = getattr(folders[dtype], network).nodes
    return sum(count for op, count in counts.items() if op.startswith("adm_rt::"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_graph_builds_with_our_nodes_as_functions(functions, case):
    report = functions[case]
    assert report["plugins"] == report["custom"] == 0
    assert report["layers"] > 50 and report["bytes"] > 1 << 20


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_graph_builds_with_every_node_of_ours_as_a_plugin(plugins, folders, case):
    network, dtype, _ = case
    report, ours = plugins[case], nodes(folders, network, dtype)
    assert ours >= 25
    assert report["plugins"] == report["custom"] == ours
    # There is a Transpose on each side of every node; TensorRT-RTX folds them into convolutions.
    assert report["transposes"] <= ours // 2


@pytest.mark.skipif(
    not tensorrt_plugins.LIBRARY.exists(),
    reason="libadm_rt_trt.so is not built: ADM_RT_CUDA=on and ADM_RT_TENSORRT_INCLUDE build it",
)
def test_the_compiled_library_takes_every_node_of_ours(folders, loader_path):
    for (network, dtype, _), report in with_plugins("library", folders, loader_path).items():
        assert report["plugins"] == report["custom"] == nodes(folders, network, dtype)


def test_plugins_make_fewer_layers_than_functions(functions, plugins):
    for case in CASES:
        assert plugins[case]["layers"] < functions[case]["layers"], case
