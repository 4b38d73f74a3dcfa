"""Long runs that are harmed again and again; each is a command of its own."""
