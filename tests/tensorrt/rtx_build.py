"""Builds engines with tensorrt_rtx in a process of its own, because the library may abort it.

    python rtx_build.py functions|plugins|library FILE PROFILE [FILE PROFILE ...]

plugins: our Python classes; library: the compiled libadm_rt_trt.so.

A line of JSON for each engine; the last line is "done".
"""

import json
import sys
import time


class Kernels:
    """Stands for the CUDA launchers: nothing runs while an engine is built."""

    def __getattr__(self, name):
        return lambda *arguments: 0


def main(ops, *arguments):
    from adm_rt.engines import tensorrt_plugins
    from adm_rt.engines.tensorrt_adapter import Profile, library

    found = library("tensorrt_rtx")
    if ops == "plugins":
        tensorrt_plugins.register(found, Kernels)
    elif ops == "library":
        tensorrt_plugins.register(found)
    for file, profile in zip(arguments[::2], arguments[1::2], strict=True):
        begin = time.perf_counter()
        built = found.build(file, Profile.parse(profile), listing=True)
        layers = [line for line in built.listing.splitlines() if line.startswith("Name: ")]
        report = {
            "bytes": len(built.plan),
            "plugins": built.plugins,
            "layers": len(layers),
            "custom": sum("LayerType: custom_layer" in line for line in layers),
            "transposes": sum(line.startswith("Name: __myl_Tran") for line in layers),
            "seconds": round(time.perf_counter() - begin, 2),
            "version": str(found),
        }
        print(json.dumps(report), flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
