"""TensorRT engines against the torch engine on a GPU: parity and throughput, a report to paste.

``python benchmarks/bench_tensorrt.py [--models NAME,NAME] [--batch N,N] [--json FILE]``; the same
as ``adm-rt bench tensorrt``, the work is in ``adm_rt/benchmarking``.
"""

import sys

from adm_rt.benchmarking import main

if __name__ == "__main__":
    sys.exit(main(["tensorrt", *sys.argv[1:]]))
