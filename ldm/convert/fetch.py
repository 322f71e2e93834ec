"""Published files by name: download with resume, check size and sha256, and only then give the file its name."""

import dataclasses
import errno
import hashlib
import http.client
import ipaddress
import logging
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import yaml
from tqdm import tqdm

from ldm.registry import ConfigError, checked, suggest

log = logging.getLogger(__name__)
CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 6  # in a row, without a new byte
DROPPED = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers worth another try


@dataclasses.dataclass(frozen=True)
class Published:
    """A file that somebody published.

    Attributes:
        url: https.
        size: bytes, or null if no source states them: the server's word is taken.
        sha256: 64 hex digits, or null if no source states it.
        licence: of the weights.
        layout: as `convert.py inspect` calls it.
        config: what reads it.
        file: name to store it under; "" takes the URL's.
    """

    url: str
    size: int | None
    sha256: str | None
    licence: str
    layout: str
    config: str
    file: str = ""

    def __post_init__(self) -> None:
        if self.stored in ("", ".", "..") or "/" in self.stored or "\\" in self.stored:
            raise ConfigError(f"file is {self.stored!r}, must be a plain file name without folders")

    @property
    def stored(self) -> str:
        """File name in the folder of weights."""
        return self.file or urlsplit(self.url).path.rpartition("/")[2]


def published(path: Path) -> dict[str, Published]:
    """The entries of a `weights.yaml`. Raises: ConfigError if it cannot be read or an entry is wrong."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not readable ({' '.join(str(error).split())}); restore it from git") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is {type(content).__name__}, must be a mapping of names to files")
    return {str(name): checked(Published, node, f"{path.name}: {name}") for name, node in content.items()}


def fetch(name: str, entries: Mapping[str, Published], out: Path, sha256: str | None = None, wait: float = 1.0) -> Path:
    """Download a published file, or go on with its `.part`; a file that is already there and right is kept.

    Args:
        name: of the entry.
        entries: as `published` gives.
        out: folder.
        sha256: what the publisher states, for an entry that has none.
        wait: seconds before the second attempt; doubled with each one that brings no byte.

    Returns: the file, whose sha256 was checked.
    Raises: ConfigError if it cannot be had, is another file, or there is no room; the final name is then not written.
    """
    if name not in entries:
        raise ConfigError(f"no published file {name!r}; known: {', '.join(entries)}{suggest(name, entries)}")
    entry, target = entries[name], out / entries[name].stored
    wanted = _wanted(name, entry, sha256)
    _check_address(entry.url)
    if target.exists():
        if _digest(target) == wanted:
            return target
        raise ConfigError(f"{target} exists and is another file than {name!r}; move it away, or choose another --out")
    part = target.with_name(target.name + ".part")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _room(entry, part)
        _download(entry, part, wait)
        if (found := _digest(part)) != wanted:
            part.unlink()
            raise ConfigError(f"{entry.url} has sha256 {found}, must be {wanted}: deleted; ask the publisher, or retry")
        os.replace(part, target)
    except OSError as error:
        what = "disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise ConfigError(
            f"{target} could not be written ({what}); mend that and run the same command again"
        ) from error
    return target


def _wanted(name: str, entry: Published, given: str | None) -> str:
    wanted = (given or entry.sha256 or "").lower()
    if not wanted:
        raise ConfigError(
            f"{name}: no sha256 is known, and an unchecked file is not kept; give the publisher's with --sha256 HEX"
        )
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise ConfigError(f"{name}: sha256 is {wanted!r}, must be 64 hexadecimal digits")
    if entry.sha256 and entry.sha256.lower() != wanted:
        raise ConfigError(f"{name}: --sha256 is {wanted}, the list has {entry.sha256}; drop --sha256")
    return wanted


def _check_address(url: str) -> None:
    """Only https, or this machine itself. Raises: ConfigError."""
    where = urlsplit(url)
    if where.scheme != "https" and not (where.scheme == "http" and _local(where.hostname or "")):
        raise ConfigError(f"address is {url}, must be https; correct the list of published files")


def _local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects (publishers send on to storage) to allowed addresses only, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl)
        if urlsplit(req.full_url).scheme == "https" != urlsplit(newurl).scheme:
            raise ConfigError(f"{req.full_url} sends on to {newurl}, must stay https; download it in a browser")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _room(entry: Published, part: Path) -> None:
    needed = (entry.size or 0) - (part.stat().st_size if part.exists() else 0)
    if (free := shutil.disk_usage(part.parent).free) < needed:
        raise ConfigError(
            f"{part.parent} has {free / 1e9:.1f} GB free, {entry.stored} needs {needed / 1e9:.1f} GB more; "
            "make room, or choose another --out"
        )


def _download(entry: Published, part: Path, wait: float) -> None:
    """Append to `part` until it has the published size. Raises: ConfigError if that cannot be reached."""
    local = _local(urlsplit(entry.url).hostname or "")
    proxies = [urllib.request.ProxyHandler({})] if local else []
    opener = urllib.request.build_opener(_Redirects, *proxies)
    failures = 0
    with part.open("ab") as file, tqdm(total=entry.size, unit="B", unit_scale=True, disable=None) as bar:
        while entry.size is None or file.tell() < entry.size:
            have = file.tell()
            try:
                entry = _append(opener, entry, file, bar)
                reason = "the connection ended early"
            except urllib.error.HTTPError as error:
                if error.code not in PASSING:
                    raise ConfigError(_refused(entry, error)) from error
                reason = f"answer {error.code}"
            except DROPPED as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            failures = 0 if file.tell() > have else failures + 1
            if failures == ATTEMPTS:
                raise ConfigError(
                    f"{entry.url} failed {ATTEMPTS} times ({reason}); {file.tell()} of {entry.size or 'unknown'} bytes "
                    f"are in {part}: run the same command again to go on"
                )
            if failures:
                log.warning("%s: %s; trying again", entry.stored, reason)
                time.sleep(wait * 2 ** (failures - 1))
        if file.tell() > entry.size:
            file.truncate(0)
            raise ConfigError(f"{part} was larger than the published {entry.size} bytes: emptied; run it again")
        file.flush()
        os.fsync(file.fileno())


def _append(opener: urllib.request.OpenerDirector, entry: Published, file: BinaryIO, bar: Any) -> Published:
    """One request for what is missing. A server that sends the whole file all the same starts it afresh.

    Returns: the entry with its size, as the server says where the list does not.
    """
    have = file.tell()
    headers = {"User-Agent": "ldm-adapters", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with opener.open(urllib.request.Request(entry.url, headers=headers), timeout=TIMEOUT) as answer:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        goes_on = answer.status == 206 and span is not None and int(span[1]) == have
        total = span[2] if span and goes_on else answer.headers.get("Content-Length", "")
        size = entry.size or (int(total) if total.isdigit() else 0)
        if not size:
            raise ConfigError(f"{entry.url} states no size; download it in a browser and give that file as weights")
        if total.isdigit() and int(total) != size:  # before anything is thrown away: it may be a login page
            raise ConfigError(f"{entry.url} has {total} bytes, must be {size}: it was replaced; ask the publisher")
        if not goes_on:
            have = 0
            file.truncate(0)
            file.seek(0)
        bar.update(have - bar.n)
        bar.total = size
        while (room := size - file.tell()) and (data := answer.read(min(CHUNK, room))):
            file.write(data)
            bar.update(len(data))
    return dataclasses.replace(entry, size=size)


def _refused(entry: Published, error: urllib.error.HTTPError) -> str:
    what = {
        401: "wants a login",
        403: "wants a login",
        404: "is not there",
        410: "is not there any more",
        416: "is shorter than the .part here; delete that file",
    }.get(error.code, "was refused")
    return f"{entry.url} {what} (answer {error.code}); download it in a browser and give that file as weights"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
