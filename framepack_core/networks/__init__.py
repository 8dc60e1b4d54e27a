"""What is computed: the transformer, the VAE, the encoders, how they are loaded and changed."""
