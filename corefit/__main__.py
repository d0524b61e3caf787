"""python -m corefit, which is what accelerate launch -m wants."""

from corefit.cli import main

main()
