"""The way back from latents to data, and what steers it; may import the rest of `flow` and `configuration_tarflow`."""
