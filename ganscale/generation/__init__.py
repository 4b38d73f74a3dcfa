"""From latents to pictures, with a trained generator."""
