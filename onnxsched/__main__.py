"""`python -m onnxsched` is the command line."""

from onnxsched.cli import main

main()
