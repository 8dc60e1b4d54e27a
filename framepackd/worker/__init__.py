"""The process with torch: a job from its request to its video."""
