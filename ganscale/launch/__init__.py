"""Where the workers run: in this process, or under Ray. Only this package imports ray."""
