"""The recurrent part of the network: a stack of SRU layers, or the LSTM and GRU it is compared with.

Shape suffixes: B sequences, T positions, H hidden width.
"""

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from predictor.sru import SRULayer


class Recurrent(nn.Module):
    """A stack of recurrent layers, `[B, T, H]` to `[B, T, H]`; padding does not influence the real tokens.

    Args:
        cell: "sru", "lstm" or "gru".
        width: H.
        depth: Layers.
        bidirectional: Whether half of the channels reads from right to left.
    """

    def __init__(self, cell: str, width: int, depth: int, bidirectional: bool) -> None:
        super().__init__()
        self.layers: nn.ModuleList | None = None
        if cell == "sru":
            self.layers = nn.ModuleList(SRULayer(width, bidirectional) for _ in range(depth))
            return
        kind = {"lstm": nn.LSTM, "gru": nn.GRU}[cell]
        half = width // 2 if bidirectional else width
        self.stack = kind(width, half, depth, batch_first=True, bidirectional=bidirectional)

    def forward(self, x_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        """Runs all layers; values at padded positions mean nothing."""
        if self.layers is not None:
            x_TBH, mask_TB = x_BTH.transpose(0, 1), mask_BT.T
            for layer in self.layers:
                x_TBH = layer(x_TBH, mask_TB)
            return x_TBH.transpose(0, 1)
        packed = pack_padded_sequence(x_BTH, mask_BT.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        output: Tensor = pad_packed_sequence(self.stack(packed)[0], batch_first=True, total_length=x_BTH.shape[1])[0]
        return output
