"""Repositories, their files and pages; may import the model, `flow` and `images`, and not the pipeline."""
