"""Networks, guided steps and whole samples against eager PyTorch and other runtimes.

``python benchmarks/bench_sample.py [--json FILE] [--chart FILE]``; the same as ``adm-rt bench
sample``, the work is in ``adm_rt/benchmarking``. On a GPU: ``--device cuda``.
"""

import sys

from adm_rt.benchmarking import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
