"""Exit codes by which a process tells its launcher why it ended (standard library only)."""

from __future__ import annotations

# The user has to mend something: a configuration, an input, the environment. The last line of stderr says what.
EXIT_REFUSED = 2
# Asked to stop (SIGINT, SIGTERM, SIGUSR1): a training step was finished and saved, any other work cleaned up; start
# again to continue.
EXIT_PREEMPTED = 85
# The loss or the gradient norm was not finite and the run is configured to stop: starting again repeats it.
EXIT_NON_FINITE = 86
# A newer attempt at the same run holds the run folder: this one stopped without writing.
EXIT_FENCED = 87
# A stage has ended and the next one has a layout of its own: saved; start again (with that many ranks) to continue.
EXIT_LAYOUT = 88
