"""The networks: transformer, VAE, encoders; loads, quantizes and compiles them, merges LoRAs."""
