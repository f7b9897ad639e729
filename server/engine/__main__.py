"""`python -m server.engine FD`: the engine process on an inherited socket."""

import os
import sys

from server.engine.process import main

status = main(int(sys.argv[1]))
sys.stderr.flush()
os._exit(status)  # loads and checks under way are of no use to anybody now
