"""Makes latents from noise: the solver, and caches that skip steps."""
