"""The `trace-fast` command, also as `python -m trace_fast`: a core without typer gets a sentence."""

import sys

from trace_fast.extras import require

__all__ = ["main"]


def main() -> None:
    """Run the `trace-fast` command."""
    try:
        require("trace-fast", "typer")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    from trace_fast import cli

    cli.main()


if __name__ == "__main__":
    main()
