"""The command line in this process, for tests that look at exit codes and at what is printed."""

from marginalia import cli


def marginalia(*words: object) -> int:
    """The exit code of `marginalia WORDS`, which prints as it does."""
    try:
        cli.app([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("the command line came back without an exit code")
