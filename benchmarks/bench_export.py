"""Exported graphs in ONNX Runtime against the torch modules.

``python benchmarks/bench_export.py [--json FILE]``; the same as ``adm-rt bench export``.
The work is in ``adm_rt/benchmarking/export.py``.
"""

import sys

from adm_rt.benchmarking import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
