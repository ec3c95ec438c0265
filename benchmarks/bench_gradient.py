"""The classifier's gradient network against autograd.

``python benchmarks/bench_gradient.py [--json FILE]``; the same as ``adm-rt bench gradient``.
The work is in ``adm_rt/benchmarking/gradient.py``.
"""

import sys

from adm_rt.benchmarking import main

if __name__ == "__main__":
    sys.exit(main(["gradient", *sys.argv[1:]]))
