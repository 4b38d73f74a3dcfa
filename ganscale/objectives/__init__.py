"""What the networks minimise: pure functions of logits, images and latents."""
