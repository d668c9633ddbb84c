"""Read a file of weights, of PyTorch or safetensors, or say what else it is."""

import contextlib
import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

from utils import DamagedFile, UserError, guard, read_tensors

HEAD_BYTES = 2**20  # of a file that is refused: more than the pickle of a network takes
MOST_HEADER_BYTES = 2**22  # of safetensors; a ResNet-18 has 12,000
# Archives by a name in them, and what makes a state_dict of one.
ARCHIVES = {"constants.pkl": ("a TorchScript archive", "torch.jit.load({}).state_dict()"),
            "archive_format": ("an archive of torch.export", "torch.export.load({}).state_dict")}
# The same of pickles: of any, of a module, and of a dict that holds modules or state_dicts.
LOAD = "torch.load({}, weights_only=False)"
OF_MODULE = f"{LOAD}.state_dict()"
OF_DICT = (f'{{{{k: getattr(v, "state_dict", lambda: v)() for k, v in {LOAD}.items() '
           "if isinstance(v, torch.nn.Module) "
           "or isinstance(v, dict) and all(map(torch.is_tensor, v.values()))}}")


def read(path: Path) -> Any:  # noqa: ANN401
    """Return what a file holds, its tensors on the CPU; raises UserError."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(9)
    # The length of the header, in 8 bytes, then its JSON; https://huggingface.co/docs/safetensors.
    if start[4:] == b"\0\0\0\0{":
        return _read_safetensors(path, int.from_bytes(start[:8], "little"))
    try:
        return read_tensors(path)
    except DamagedFile as error:
        raise UserError(_refusal(path, error)) from error


def _read_safetensors(path: Path, header_bytes: int) -> dict:
    with guard(f"{path}: reading safetensors needs one more package: pip install safetensors",
               ImportError):
        from safetensors.torch import load_file
    with guard(f"{path}: a damaged safetensors file", Exception, "; get or make it again"):
        if header_bytes > MOST_HEADER_BYTES:
            raise ValueError(f"a header of {header_bytes:,} bytes")
        return load_file(path)


def _refusal(path: Path, error: DamagedFile) -> str:
    """Return why a file is not read and, if it is whole, a command that saves its weights."""
    what, expression = _identify(path, str(error.__cause__))
    if not what:
        return f"{error}; get or make it again"
    source, target = (json.dumps(str(name), ensure_ascii=False)
                      for name in (path, path.with_name(f"{path.stem}-weights.pth")))
    code = f"import torch; torch.save({expression.format(source)}, {target})"
    return (f"{path}: {what}, and reading it could run code; if you trust it, make a state_dict "
            f"of it: python -c {shlex.quote(code)}")


def _identify(path: Path, reason: str) -> tuple[str, str]:
    """Return what torch did not read for this reason, and what makes a state_dict of it, or ""."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PK"):
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # maybe damaged
            for name in {Path(name).name for name in archive.namelist()} & ARCHIVES.keys():
                return ARCHIVES[name]
    elif re.match(rb"\x80[\x02-\x05][^\x8a]", head):  # torch.save writes a long number first
        return "a pickle that torch.save did not write", '__import__("pickle").load(open({}, "rb"))'
    holds_module = b"torch.nn.modules." in head
    if found := re.search(r"GLOBAL ([\w.]{1,100}) was not", reason):
        # A pickled module begins with its class, before PyTorch 1.6 with a part of its source.
        name = re.escape("\n".join(found[1].rsplit(".", 1)).encode())
        pattern = rb"\x80\x02(\(X\x06\0\0\0moduleq\0)?c" + name + b"\n"
        if holds_module and re.search(pattern, head):
            return f"a pickled {found[1]}", OF_MODULE
        return f"it holds {found[1]}", OF_DICT
    if head.startswith(b"PK") and "Unsupported operand" in reason:
        return "a pickle of a newer protocol", OF_MODULE if holds_module else LOAD
    return "", ""
