"""What the players minimise: pure functions of logits."""
