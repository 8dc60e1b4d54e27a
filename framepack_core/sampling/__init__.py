"""From noise to latents: the solver, and step caches that skip what changes little."""
