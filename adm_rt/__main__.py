"""``python -m adm_rt`` is the command ``adm-rt``."""

from adm_rt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
