"""`python -m longlora` is the `longlora` command."""

from longlora.cli import main

main()
