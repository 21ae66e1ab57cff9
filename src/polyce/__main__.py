"""`python -m polyce`: what is installed; `python -m polyce demo`: a classifier trained with it."""

from __future__ import annotations

import sys

from polyce.explain import show_versions

USAGE = """usage: python -m polyce [demo]

  (nothing)  versions, array libraries and implementations found here
  demo       a digit classifier, then digits, time and memory beside torch's or NumPy's"""


def main(arguments: list[str]) -> int:
    """Run one of the two commands and return the exit code."""
    if not arguments:
        show_versions()
        return 0
    if arguments == ["demo"]:
        from polyce.demo import demo

        demo()
        return 0
    wanted = arguments in (["--help"], ["-h"])
    print(USAGE, file=sys.stdout if wanted else sys.stderr)
    return 0 if wanted else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
