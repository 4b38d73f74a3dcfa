"""Images in: sources, shards, the order they are read in, and the reader."""
