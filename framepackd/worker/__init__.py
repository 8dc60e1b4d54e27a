"""The process with torch: makes a job's video from its request, and writes checkpoints."""
