"""`python -m normtune`, the form that launchers such as torchrun and accelerate take."""

from normtune.cli import main

main()
