"""The parent process of `medley serve`: starts everything in order, watches it, and stops it in the opposite order.

    lock the data folder → engine process and private Redis, side by side → index and its mirror → HTTP listens
    → the engine is ready → the demo's tasks, if any → the line that says so

HTTP listens before the base is loaded, so that `/healthz` answers from the start. SIGTERM or Ctrl-C drains: new
requests are refused, running ones get `drain_timeout` seconds; a second signal does not wait. The children lead
sessions of their own, so a terminal's Ctrl-C does not reach them; they are stopped last, and die with this process
however it dies. A Redis that dies is started again; an engine that dies ends the server, whose own supervisor starts
it anew.
"""

from server.supervisor.life import run

__all__ = ["run"]
