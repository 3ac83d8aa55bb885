"""`python -m trace_fast` is the `trace-fast` command, for launchers that start modules."""

from trace_fast.cli import main

main()
