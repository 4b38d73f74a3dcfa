"""The training loop and its parts: steps, inputs, distribution, checkpoints, guard and watchdog.

Nothing here knows of Ray: a run is a function of (configuration, world), so it can be started under
Ray, torchrun or a debugger alike. `loop.py` is where to begin reading; `steps/` holds what one step
computes, a file a method.
"""
