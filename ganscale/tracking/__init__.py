"""What happened, for files, dashboards and people."""
