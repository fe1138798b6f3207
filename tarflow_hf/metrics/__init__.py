"""How good a model is: bits per dimension and distances between sets of images, measured batch by batch.

`bits_per_dim.py` and `frechet_distance.py` are `evaluate` modules (`evaluate.load(path)`, or their classes). What they
stand on, and what works without them:

- pure functions and classes of NumPy: `statistics` (streamed, mergeable float64 moments and a uniform sample) and
  `distances` (Fréchet and kernel distance, precision, recall, density, coverage);
- `features`: networks that turn images into features; `images`: real images, and their statistics cached by content;
- `likelihood`: log-densities of dequantised images; `samples`: a pipeline's samples and the files evaluators read;
- `resumable` and `measure`: the same over several processes, batch by batch, so that stopping loses nothing;
- `small_example`: what the examples in docstrings measure;
- `report`, `atomic` and `command_line`: where results go, and the options that the examples share.
"""
