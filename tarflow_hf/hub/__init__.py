"""Repositories, their files and pages; may import `flow`, `images` and the configuration, and no model."""
