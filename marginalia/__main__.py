"""The process's entry: the console script, and `python -m marginalia`, by which torchrun starts a training.

No command imports code from the current folder, which may be one that somebody sent; `python -m` is told so in this
package's `__init__`. A user's own network is the exception: `training.models.own` imports the module that
`model.architecture` names from the project's folder, when a training's command builds or loads that network.
"""

import os


def main() -> None:
    """Run the command that the process was started with; does not return."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    os.environ["PYTHONSAFEPATH"] = "1"  # the same for Python processes that a command starts
    from marginalia import cli

    cli.app(prog_name="marginalia")


if __name__ == "__main__":
    main()
