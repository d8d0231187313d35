"""One home: the folder that holds all of cliptune's state, owned by one daemon at a time.

Enters: a path. Leaves: the paths of everything below it, and the lock that keeps a second daemon out. Opened
by the daemon before anything else; jobs, registry and engines ask it where their files are.

    daemon.lock   flock held while the daemon lives; its JSON names the owner
    daemon.json   addresses of the running daemon, gone after a clean stop
    link.sock     where trainers dial in (elsewhere when the path would be too long for a socket)
    cliptune.db   index, rebuilt from the files when missing
    serving.json  which models are loaded
    data/         uploads
    jobs/<id>/    see `training/job_folder.py`
    models/<name>/<version>/
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cliptune.durable import write_atomically
from cliptune.errors import HomeLockedError, InvalidInputError

# A socket address holds 104 bytes on macOS and 108 on Linux, the closing zero among them.
_MAX_SOCKET_PATH_BYTES: Final = 90


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who holds a home."""

    pid: int
    host: str
    started: str
    """UTC, ISO 8601."""
    grpc: str = ""
    """Address such as "127.0.0.1:50051". Empty until the daemon listens."""
    http: str = ""

    def __str__(self) -> str:
        addresses = "".join(f", {face} {at}" for face, at in (("gRPC", self.grpc), ("HTTP", self.http)) if at)
        return f"the daemon with pid {self.pid} on {self.host}{addresses}, running since {self.started}"


class Home:
    """A home that this process owns. Make one with `Home.open`; `close` gives it up."""

    def __init__(self, root: Path, lock_fd: int, owner: Owner) -> None:
        self.root: Final = root
        self.owner = owner
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path | str) -> Home:
        """Takes the home at `path`, making it when missing. `HomeLockedError` names its owner."""
        root = Path(path).expanduser().resolve()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise InvalidInputError(f"the home {root} is not a folder", path=root) from None
        lock_fd = os.open(root / "daemon.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read_owner(lock_fd)
            os.close(lock_fd)
            named = str(owner) if owner else "another daemon"
            raise HomeLockedError(f"the home {root} belongs to {named}", owner=named, path=root) from None
        owner = Owner(
            pid=os.getpid(),
            host=socket.gethostname(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        home = cls(root, lock_fd, owner)
        home._write_owner()
        for folder in (home.data_dir, home.jobs_dir, home.models_dir):
            folder.mkdir(exist_ok=True)
        return home

    @property
    def data_dir(self) -> Path:
        """Uploads."""
        return self.root / "data"

    @property
    def jobs_dir(self) -> Path:
        """One folder a job."""
        return self.root / "jobs"

    @property
    def models_dir(self) -> Path:
        """Published models, `<name>/<version>/`."""
        return self.root / "models"

    @property
    def database_path(self) -> Path:
        """The SQLite index."""
        return self.root / "cliptune.db"

    @property
    def serving_path(self) -> Path:
        """Which models are loaded, over restarts."""
        return self.root / "serving.json"

    @property
    def address_path(self) -> Path:
        """Addresses of the running daemon, for other programs of this user."""
        return self.root / "daemon.json"

    def link_path(self) -> Path:
        """The trainer link's socket: the same for one home always, so that a trainer finds a new daemon.

        A home with a long path gets a private folder under /tmp. `HomeLockedError` when that is another's.
        """
        direct = self.root / "link.sock"
        if len(os.fsencode(direct)) <= _MAX_SOCKET_PATH_BYTES:
            return direct
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        folder = Path("/tmp") / f"cliptune-{os.getuid()}-{digest}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise HomeLockedError(f"{folder} is not a private folder of this user: remove it", path=folder)
        return folder / "link.sock"

    def announce(self, *, grpc: str, http: str) -> None:
        """Writes the addresses that the daemon listens on into its lock and `daemon.json`."""
        self.owner = Owner(
            pid=self.owner.pid, host=self.owner.host, started=self.owner.started, grpc=grpc, http=http
        )
        self._write_owner()
        write_json(self.address_path, {"pid": self.owner.pid, "grpc": grpc, "http": http})

    def close(self) -> None:
        """Gives the home up; a second call does nothing."""
        if self._lock_fd < 0:
            return
        self.address_path.unlink(missing_ok=True)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_owner(self) -> None:
        # In place: a rename would leave the lock on a file that nobody finds any more.
        text = json.dumps(asdict(self.owner)).encode()
        os.pwrite(self._lock_fd, text, 0)
        os.ftruncate(self._lock_fd, len(text))


def write_json(path: Path, content: Mapping[str, Any], *, mode: int = 0o600) -> None:
    """Writes a small JSON file; a reader, or a crash, finds the old one or the new one, never half."""
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1).encode(), mode=mode)


def _read_owner(lock_fd: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(lock_fd, 4096, 0)))
    except (ValueError, TypeError):
        # The owner is between taking the lock and signing it.
        return None
