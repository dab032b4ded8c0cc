"""What a mask tensor means as an object of anyattn, noted on the tensor itself.

Models of Transformers slice, index and concatenate the masks that they are given, so a mask function must return a
tensor. The tensor that arrives unchanged at the attention layer still has its note; anything made of it has none and
means what its values say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyattn.masks.objects import Mask

_KEY = "_anyattn_note"


@dataclass(frozen=True, slots=True)
class Note:
    """What a dense boolean mask says.

    Attributes:
        mask: The same positions as an object; None for a causal mask in chunks, which no object says.
        packed: For packed sequences of a batch of one, where each begins (int32, with the end), and the longest.
        chunk: The length of the chunks, 0 for none.
        version: The tensor's version when the note was written; a later write to it makes the note void.
    """

    mask: Mask | None
    packed: tuple[Tensor, int] | None
    chunk: int
    version: int

    @property
    def is_pattern(self) -> bool:
        """Whether the mask is causal or a window, chunked or not, and nothing else."""
        mask = self.mask
        return mask is None or (mask.key is None and mask.block is None)


def write(tensor: Tensor, mask: Mask | None, packed: tuple[Tensor, int] | None = None, chunk: int = 0) -> Tensor:
    """Note on a dense mask what it says, and return it. Inference tensors, which count no writes, get no note."""
    if type(tensor) is Tensor and not tensor.is_inference():
        tensor.__dict__[_KEY] = Note(mask, packed, chunk, tensor._version)
    return tensor


def read(tensor: Tensor) -> Note | None:
    """Return the note on a tensor, if it has one and the tensor wasn't written to since."""
    if torch.compiler.is_compiling():
        return None
    note: Note | None = tensor.__dict__.get(_KEY)
    return note if note is not None and note.version == tensor._version else None
