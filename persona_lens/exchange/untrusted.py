"""Reading `.pt` files that others wrote, without trusting them.

Only zip archives of `torch.save` are opened, with `weights_only=True`, which builds tensors and plain containers and calls nothing.
Sizes are checked before (a compressed archive may be far larger than its file) and after (a tensor may claim any shape over a
small storage).
"""

import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from persona_lens.errors import ExchangeError

MAX_BYTES: Final = 1 << 30


def require_size(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        ExchangeError: there is no such file, or it is larger than vectors can be.
    """
    if not path.is_file():
        raise ExchangeError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ExchangeError(f"{path}: {size} bytes are more than vectors need (at most {MAX_BYTES}): is it a model?")
    return size


def load_pt(path: Path) -> Any:
    """What a `.pt` file holds: a tensor, or plain containers of tensors, numbers and texts. Nothing in it is executed.

    Raises:
        ExchangeError: missing, too large, no archive of `torch.save`, or with anything else inside.
    """
    require_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ExchangeError(f"{path}: is no file of torch.save in its present form, a zip archive ({error})") from error
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > MAX_BYTES:
        raise ExchangeError(f"{path}: is compressed or claims more than {MAX_BYTES} bytes, as no file of torch.save does")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the unpickler raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExchangeError(f"{path}: holds more than tensors and plain containers, or is damaged ({reason[0][:200]})") from error


def as_tensor(value: Any, path: Path, what: str, ndim: int) -> Float[Tensor, "..."]:
    """A value of a file as a finite fp32 tensor of its own memory.

    Raises:
        ExchangeError: no plain tensor of floating-point numbers; of another rank, empty, larger than the file, or not finite.
    """
    if type(value) not in (Tensor, Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        raise ExchangeError(f"{path}: {what} is a {type(value).__name__}, expected a plain tensor")
    if not value.is_floating_point():
        raise ExchangeError(f"{path}: {what} holds {str(value.dtype).removeprefix('torch.')}, expected floating-point numbers")
    shape = tuple(value.shape)
    if len(shape) != ndim or not value.numel():
        raise ExchangeError(f"{path}: {what} has shape {shape}, expected {'(row, d_model)' if ndim == 2 else '(d_model,)'}")
    size = path.stat().st_size
    if value.numel() * value.element_size() > size or value.untyped_storage().nbytes() > size:
        raise ExchangeError(f"{path}: {what} claims shape {shape}, more than the {size} bytes of the file can hold")
    found = value.detach().to(torch.float32, copy=True).contiguous()
    if not bool(found.isfinite().all()):
        raise ExchangeError(f"{path}: {what} is not finite")
    return found
