"""Files and data sets become tensors, and tensors pictures; may import no other room."""
