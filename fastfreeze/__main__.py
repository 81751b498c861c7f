"""``python -m fastfreeze``: the command line."""

from fastfreeze.cli import main

main(prog_name="fastfreeze")
