"""``python -m blockstep``."""

from blockstep.cli import main

main()
