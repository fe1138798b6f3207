"""The learned inverse of a flow: a bidirectional transformer that turns latents into images in one pass."""
