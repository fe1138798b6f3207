"""The keys and values of one flow block's attention layers, preallocated and written by position."""

import torch


class KeyValueCache:
    """Keys and values of the tokens a block has read so far.

    The cache is passed to a block's forward. A sweep over the tokens start ... stop - 1 overwrites just these slots
    and attends to the slots 0 ... stop - 1, so a token that is read again replaces what was stored for it and nothing
    has to be committed or rewound. Memory is claimed at the first update of each layer and used again by the next
    block: decoding holds one block's keys and values, whatever the number of blocks. The first batch must be the
    largest.

    Args:
        num_tokens: Slots of a layer, the length of the sequence.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.layers: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None

    def update(self, key_value: torch.Tensor, layer_idx: int, start: int) -> torch.Tensor:
        """Stores the keys and values of a run of tokens and returns those of all tokens up to its end.

        Args:
            key_value: (batch, 2 * heads, tokens, head_dim) keys, then values, of the tokens start ... start + tokens
                - 1, head by head.
            layer_idx: The layer; layers are first met in the order 0, 1, 2, ...
            start: Position of the first token in the block's own order.

        Returns:
            (batch, 2 * heads, start + tokens, head_dim), a view.
        """
        batch, heads, tokens, head_dim = key_value.shape
        if layer_idx == len(self.layers):
            self.layers.append(key_value.new_empty(batch, heads, self.num_tokens, head_dim))
        stored = self.layers[layer_idx]
        if batch < stored.shape[0]:
            stored = stored[:batch]
        stored.narrow(2, start, tokens).copy_(key_value)
        return stored.narrow(2, 0, start + tokens)

    def mask(self, start: int, stop: int) -> torch.Tensor | None:
        """Which slots the tokens start ... stop - 1 may attend to: each to itself and those before it.

        Args:
            start: Position of the first token in the block's own order, at least 1.
            stop: One past the last.

        Returns:
            (stop - start, stop) numbers to add to the logits, 0 or -inf, a view; None where every slot may be seen.
        """
        if stop - start == 1:
            return None
        if self._mask is None:
            self._mask = self.layers[0].new_full((self.num_tokens, self.num_tokens), float("-inf")).triu(1)
        return self._mask[start:stop, :stop]


__all__ = ["KeyValueCache"]
