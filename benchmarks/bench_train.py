"""A training step against plain torch: ``python benchmarks/bench_train.py [--json FILE]``.

The same as ``adm-rt bench train``; the work is in ``adm_rt/benchmarking/train.py``.
"""

import sys

from adm_rt.benchmarking import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
