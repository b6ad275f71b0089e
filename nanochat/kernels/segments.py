"""Document boundaries inside a row, and right padding: the two masks that every recurrent kernel shares.

Letters: B batch, T time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def resets(segments_BT: Tensor) -> Tensor:
    """(B, T) bool: True at the first token of every segment but the row's first.

    The row's first token never resets: it continues the document that the initial state comes from.
    """
    mask_BT = torch.zeros_like(segments_BT, dtype=torch.bool)
    mask_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return mask_BT


def last_document(tail_BKE: Tensor, segments_BT: Tensor) -> Tensor:
    """The state of a convolution after a row, (B, K - 1, E), with zeros for inputs of other documents than the last.

    Inputs from before the row belong to its first document.
    """
    n_tail = tail_BKE.size(1)
    if not n_tail:
        return tail_BKE
    document_BT = resets(segments_BT).cumsum(1)
    inside_BK = F.pad(document_BT, (n_tail, 0))[:, -n_tail:] == document_BT[:, -1:]
    return tail_BKE * inside_BK[:, :, None].to(tail_BKE.dtype)


def document_starts(segments_BT: Tensor) -> Tensor:
    """(documents + 1,): where each document of the rows laid end to end begins, and the end of the last."""
    first_BT = resets(segments_BT)
    first_BT[:, 0] = True
    start = torch.nonzero(first_BT.view(-1))[:, 0]
    return torch.cat((start, start.new_full((1,), segments_BT.numel())))


def padding(lengths: Tensor, n_time: int) -> Tensor:
    """(B, T) bool: True at positions beyond a row's length."""
    return torch.arange(n_time, device=lengths.device) >= lengths[:, None]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Recurrent states and decays are never kept below float32; float64 stays for the oracles."""
    return torch.float64 if dtype == torch.float64 else torch.float32
