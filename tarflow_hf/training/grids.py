"""What a model knows about the places of one grid of patches, for another grid: images of another size or shape."""

import torch
import torch.nn.functional as F


def interpolate_over_grid(values: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Values at the patches of one grid as values at the patches of another, corner on corner, by straight lines.

    f(i, j) -> f(i (R - 1) / (R' - 1), j (C - 1) / (C' - 1)), with f between patches linear in i and in j. The corners
    keep their values, as the first and the last of a line are what a block has to know exactly.

    Args:
        values: (rows * columns, n) in raster order.
        old: Rows R and columns C of their grid.
        new: R' and C' of the new one.

    Returns:
        (rows' * columns', n) values, of the same dtype.

    Example:
        >>> interpolate_over_grid(torch.tensor([[0.0], [2.0]]), (1, 2), (1, 3)).flatten()
        tensor([0., 1., 2.])
    """
    image = values.to(torch.promote_types(values.dtype, torch.float32)).unflatten(0, old).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=new, mode="bilinear", align_corners=True)
    return image[0].permute(1, 2, 0).flatten(0, 1).to(values.dtype)


def likeness(old: tuple[int, int], new: tuple[int, int]) -> float:
    """How much a place in one grid has in common with that in another: s of [`positions_over_grid`].

    Example:
        >>> likeness((4, 4), (4, 8))
        0.5
    """
    return min(min(sides) / max(sides) for sides in zip(old, new, strict=True))


def positions_over_grid(values: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings for another grid: interpolated over the image, and nearer to their mean.

    p -> m + s (p' - m), with p' of [`interpolate_over_grid`], m the mean of p' and s = min over rows and columns of
    min(R / R', R' / R). A block has learned what to expect at a place in patches of the old scale. In patches of
    another scale that is the less true the more the scales differ, and a block that is as sure as before is wrong by
    more than one that does not know where it is: examples/README.md has the measurements.

    Args:
        values: (rows * columns, hidden_size) embeddings in raster order.
        old: Rows R and columns C of their grid.
        new: R' and C' of the new one.

    Returns:
        (rows' * columns', hidden_size) embeddings; for the same grid the same ones.

    Example:
        >>> positions_over_grid(torch.tensor([[0.0], [2.0]]), (1, 2), (1, 4)).flatten()
        tensor([0.5000, 0.8333, 1.1667, 1.5000])
    """
    placed = interpolate_over_grid(values, old, new)
    return torch.lerp(placed.mean(0, keepdim=True).expand_as(placed), placed, likeness(old, new))


__all__ = ["interpolate_over_grid", "likeness", "positions_over_grid"]
