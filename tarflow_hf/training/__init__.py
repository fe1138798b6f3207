"""A training run, from its recipe to its page; may import every room but `metrics` and `conversion`."""
