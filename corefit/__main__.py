"""python -m corefit, which is what accelerate launch -m wants."""

from corefit.cli.commands import main

main()
