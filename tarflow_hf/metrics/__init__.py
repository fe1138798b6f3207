"""How good a model is: bits per dimension and distances between sets of images, measured batch by batch.

`bits_per_dim.py` and `frechet_distance.py` are `evaluate` modules. Underneath them, and usable without them:
`statistics` (streamed, mergeable float64 moments), `distances` (Fréchet, kernel, precision and recall of two sets),
`features` (networks that turn images into features), `references` (the statistics of the real images),
`batches` (resumable work over many processes), `likelihood` (exact log-densities of a data set) and `samples`.
"""
