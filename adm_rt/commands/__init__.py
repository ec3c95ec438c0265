"""The sub-commands of ``adm-rt``; each module has ``add_arguments(parser)`` and ``run(args)``."""
