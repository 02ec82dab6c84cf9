"""``python -m hwprune`` is the command line."""

from hwprune.cli import main

main()
