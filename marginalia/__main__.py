"""The process's entry: the console script, and `python -m marginalia`, by which torchrun starts a training."""

import os
import sys
from pathlib import Path


def main() -> None:
    """Run the command that the process was started with; does not return."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    # Before all imports: the project's own network, and in a checkout or an experiment's copy of one its own code.
    sys.path.insert(0, str(Path.cwd()))
    from marginalia import cli

    cli.app(prog_name="marginalia")


if __name__ == "__main__":
    main()
