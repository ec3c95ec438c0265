"""The three ops against plain torch: ``python benchmarks/bench_ops.py [--json FILE]``.

The same as ``adm-rt bench ops``; the work is in ``adm_rt/benchmarking``.
"""

import sys

from adm_rt.benchmarking import main

if __name__ == "__main__":
    sys.exit(main(["ops", *sys.argv[1:]]))
