"""The three ops on CUDA against plain torch: ``python benchmarks/bench_cuda_ops.py [--json FILE]``.

The work is in ``adm_rt/benchmarking/cuda_ops.py``; ``make gpu`` runs it.
"""

import sys

from adm_rt.benchmarking.cuda_ops import main

if __name__ == "__main__":
    sys.exit(main())
