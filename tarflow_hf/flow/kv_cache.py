"""The keys and values of one flow block's attention layers, preallocated and written by position."""

import torch


def span(values: torch.Tensor, start: int | torch.Tensor, count: int, dim: int = 0) -> torch.Tensor:
    """The entries start ... start + count - 1 of a dimension: a view, or a copy where a tensor says where they start.

    What is read by a tensor has the same shape and program wherever it starts, so that one compiled graph serves all.

    Args:
        values: Any tensor.
        start: The first entry, a number or a 0-d int64 tensor on the same device.
        count: How many.
        dim: The dimension.

    Example:
        >>> span(torch.arange(5), 1, 3), span(torch.arange(5), torch.tensor(1), 3)
        (tensor([1, 2, 3]), tensor([1, 2, 3]))
    """
    if isinstance(start, torch.Tensor):
        return values.index_select(dim, start + torch.arange(count, device=values.device))
    return values.narrow(dim, start, count)


class KeyValueCache:
    """Keys and values of the tokens a block has read so far.

    The cache is passed to a block's forward. A sweep over the tokens start ... stop - 1 overwrites just these slots
    and attends to the slots 0 ... stop - 1, so a token that is read again replaces what was stored for it and nothing
    has to be committed or rewound. Memory is claimed at the first update of each layer and used again by the next
    block: decoding holds one block's keys and values, whatever the number of blocks. The first batch must be the
    largest.

    Where `start` is a tensor, whatever a sweep reads has one shape: all slots, of which a mask hides those that the
    token may not see. They must hold finite numbers, so such a cache is made by [`zeros`].

    Args:
        num_tokens: Slots of a layer, the length of the sequence.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.layers: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls, num_layers: int, rows: int, heads: int, num_tokens: int, head_dim: int, like: torch.Tensor
    ) -> "KeyValueCache":
        """A cache whose memory is claimed at once.

        Args:
            num_layers: Attention layers of the block.
            rows: Batch of its sweeps, both branches of guidance counted.
            heads: Attention heads.
            num_tokens: Slots of a layer.
            head_dim: Width of a head.
            like: A tensor of the type of the keys and values, where they shall live.

        Example:
            >>> KeyValueCache.zeros(2, 1, 4, num_tokens=16, head_dim=8, like=torch.zeros(1)).layers[1].shape
            torch.Size([1, 8, 16, 8])
        """
        cache = cls(num_tokens)
        cache.layers = [like.new_zeros(rows, 2 * heads, num_tokens, head_dim) for _ in range(num_layers)]
        return cache

    def update(self, key_value: torch.Tensor, layer_idx: int, start: int | torch.Tensor) -> torch.Tensor:
        """Stores the keys and values of a run of tokens and returns those that they may attend to.

        Args:
            key_value: (batch, 2 * heads, tokens, head_dim) keys, then values, of the tokens start ... start + tokens
                - 1, head by head.
            layer_idx: The layer; layers are first met in the order 0, 1, 2, ...
            start: Position of the first token in the block's own order; a number or a 0-d tensor.

        Returns:
            (batch, 2 * heads, start + tokens, head_dim), a view; all slots if `start` is a tensor.
        """
        batch, heads, tokens, head_dim = key_value.shape
        if layer_idx == len(self.layers):
            self.layers.append(key_value.new_empty(batch, heads, self.num_tokens, head_dim))
        stored = self.layers[layer_idx]
        if batch < stored.shape[0]:
            stored = stored[:batch]
        if isinstance(start, torch.Tensor):
            return stored.index_copy_(2, start + torch.arange(tokens, device=start.device), key_value)
        stored.narrow(2, start, tokens).copy_(key_value)
        return stored.narrow(2, 0, start + tokens)

    def mask(self, start: int | torch.Tensor, tokens: int) -> torch.Tensor | None:
        """Which slots a run of tokens may attend to: each to itself and those before it.

        Args:
            start: Position of the first token in the block's own order; a number or a 0-d tensor.
            tokens: How many they are.

        Returns:
            (tokens, start + tokens) numbers to add to the logits, 0 or -inf, a view; (tokens, slots) if `start` is a
            tensor. None where every slot may be seen, and at the start, where attention is causal by itself.
        """
        if isinstance(start, torch.Tensor):
            slots = torch.arange(self.num_tokens, device=start.device)
            hidden = slots > start + slots[:tokens, None]
            return self.layers[0].new_zeros(()).masked_fill(hidden, float("-inf"))
        if start == 0 or tokens == 1:
            return None
        if self._mask is None:
            self._mask = self.layers[0].new_full((self.num_tokens, self.num_tokens), float("-inf")).triu(1)
        return self._mask[start : start + tokens, : start + tokens]


__all__ = ["KeyValueCache", "span"]
