"""The adversarial training loop and its parts; nothing here knows of Ray or of logging backends."""
