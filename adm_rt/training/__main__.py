"""``python -m adm_rt.training diffusion ...``: the same as ``adm-rt train diffusion ...``."""

import argparse

from adm_rt.training import cli

parser = argparse.ArgumentParser(prog="adm-rt train")
cli.add_arguments(parser)
cli.run(parser.parse_args())
