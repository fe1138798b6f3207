"""The mathematics of one pass from data to latents; may import `configuration_tarflow` alone."""
