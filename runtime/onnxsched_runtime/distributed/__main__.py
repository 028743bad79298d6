"""`torchrun -m onnxsched_runtime.distributed` is the command line of several processes."""

import sys

from onnxsched_runtime.distributed import main

main(sys.argv[1:])
