"""Training: the embedded diffusion model, and the one-step student."""
