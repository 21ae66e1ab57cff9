"""`python -m polyce`: what is installed, a demo, and the score of logits in files."""

from __future__ import annotations

import sys

from polyce.explain import show_versions

USAGE = """usage: python -m polyce [demo | score LOGITS LABELS]

  (nothing)  versions, array libraries and implementations found here
  demo       a digit classifier, then precision, time and memory compared with torch or NumPy
  score      loss, accuracy and calibration of logits in a file; score --help tells more"""


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands, by default the command line's, and return the exit code."""
    if arguments is None:
        arguments = sys.argv[1:]
    if not arguments:
        show_versions()
        return 0
    if arguments == ["demo"]:
        from polyce.demo import demo

        demo()
        return 0
    if arguments[0] == "score":
        from polyce.score import command

        return command.main(arguments[1:])
    wanted = arguments in (["--help"], ["-h"])
    print(USAGE, file=sys.stdout if wanted else sys.stderr)
    return 0 if wanted else 2


if __name__ == "__main__":
    sys.exit(main())
