"""Download the official archive: by one process at a time, resumed, and checked by its md5."""

import http.client
import os
import time
import urllib.request
from pathlib import Path

from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from utils import guard, log, try_lock

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
OFFICIAL_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"  # of torchvision, too
WAYS_OUT = (". Three ways out: put cifar-100-python.tar.gz (or another format of the README) "
            "there; name a mirror with --data-url; or try made-up images with --dataset synthetic")
RETRY_SECONDS = 1  # before the first retry of a broken download; then twice as long each time


def fetch(url: str, data_dir: Path, allowed: bool, others: list[str]) -> Path:
    """Download the official archive, or wait for a process that does; raises UserError.

    `others` are lines about what lies in `data_dir`: they are logged first, and part of the error.
    """
    note = "" if data_dir.exists() else ", which did not exist"
    partial, path = data_dir / ".cifar-100.tar.gz.part", data_dir / "cifar-100-python.tar.gz"
    with guard(f"{data_dir}: CIFAR-100 is not there, and was not downloaded from {url}",
               (OSError, ValueError, http.client.HTTPException),
               "".join(f". {line}" for line in others[:5]) + WAYS_OUT):
        if not allowed:
            raise OSError("--no-download forbids it")
        for line in others[:5]:
            log.info(f"note       {line}")
        data_dir.mkdir(parents=True, exist_ok=True)
        with open(data_dir / ".cifar-100.lock", "w") as lock:
            if not try_lock(lock):
                log.info(f"download   waiting for another process, which holds {lock.name}")
                while not try_lock(lock):
                    time.sleep(0.1)
            while path.exists() and calculate_md5(path) != OFFICIAL_MD5:  # another file
                path = path.with_name(f"official-{path.name}")
            if path.exists():
                return path
            log.info(f"download   {url} to {data_dir.resolve()}{note}")
            # What is there may be a part of another file: then start afresh, once.
            for _ in range(2 if partial.exists() else 1):
                _complete(partial, url)
                if (md5 := calculate_md5(partial)) == OFFICIAL_MD5:
                    return partial.replace(path)
                partial.unlink()
            raise OSError(f"its md5 sum, {md5}, is not official")


def _complete(partial: Path, url: str) -> None:
    """Transfer the rest of `partial`; try again if the connection breaks or the server is busy."""
    for attempt in range(5):
        try:
            return _append(partial, url)
        except (OSError, http.client.HTTPException) as error:
            status = getattr(error, "code", 500)
            if status == 416:  # range not satisfiable: everything is here already
                return
            if attempt == 4 or (status < 500 and status not in (408, 429)):
                raise
            log.info(f"download   broke off ({error}), trying again")
            time.sleep(RETRY_SECONDS * 2**attempt)


def _append(partial: Path, url: str) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:  # seconds without a byte
        if response.status != 206:  # the server does not resume
            have = 0
        total = have + int(response.headers.get("Content-Length") or 0)
        # A terminal gets a moving bar, a batch log a line a minute.
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True,
                   mininterval=0.1 if os.isatty(2) else 60)
        with open(partial, "ab" if have else "wb") as file, bar:
            while chunk := response.read(2**18):
                bar.update(file.write(chunk))
    if total and partial.stat().st_size < total:
        raise OSError(f"connection closed after {partial.stat().st_size:,} of {total:,} bytes")
