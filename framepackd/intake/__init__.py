"""Makes jobs of settled files."""
