"""`python -m server.engine FD`: the engine process on an inherited socket."""

import logging
import os
import sys

from server.engine.process import main

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
status = main(int(sys.argv[1]))
sys.stderr.flush()
os._exit(status)  # loads and checks under way are of no use to anybody now
