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
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values of a run of tokens and returns those of all tokens up to its end.

        Args:
            key: (batch, heads, tokens, head_dim) keys of the tokens start ... start + tokens - 1.
            value: The values, of the same shape.
            layer_idx: The layer; layers are first met in the order 0, 1, 2, ...
            start: Position of the first token in the block's own order.

        Returns:
            Views (batch, heads, start + tokens, head_dim) of the keys and the values.
        """
        batch, heads, _, head_dim = key.shape
        if layer_idx == len(self.keys):
            self.keys.append(key.new_empty(batch, heads, self.num_tokens, head_dim))
            self.values.append(value.new_empty(batch, heads, self.num_tokens, head_dim))
        stop = start + key.shape[2]
        keys, values = self.keys[layer_idx][:batch, :, :stop], self.values[layer_idx][:batch, :, :stop]
        keys[:, :, start:] = key
        values[:, :, start:] = value
        return keys, values


__all__ = ["KeyValueCache"]
