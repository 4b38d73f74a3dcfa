"""One HTML file about runs, made from their folders alone.

Nothing in training knows of it, so a run can be reported on while it trains, after it has died and
on another machine. It loads neither torch nor ray: pictures that a network would have to draw are
shown where a command has left them in the run's folder, and the command is named where none has.
"""

from ganscale.report.page import write_report

__all__ = ["write_report"]
