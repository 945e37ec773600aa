"""A PostgreSQL server of a test's own on loopback, from Debian's packages."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_USER = "postgres"


def missing() -> str:
    """Return why no server can be started here; empty if one can."""
    if _binaries() is None:
        return "PostgreSQL's initdb and pg_ctl are not installed (apt-get install postgresql)"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed"
    if os.geteuid() == 0:
        import pwd

        try:
            pwd.getpwnam(_USER)
        except KeyError:
            return f"root may not run PostgreSQL, and there is no user {_USER}"
    return ""


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = str(found[-1]) if found else shutil.which("initdb")
    return Path(path).parent if path else None


@contextmanager
def closed_connections() -> Iterator[None]:
    """Close what the pools of storages hold: psycopg complains of connections that are left."""
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    seen: list[Any] = []

    def note(connection: Any, _: Any) -> None:
        seen.append(connection)

    event.listen(Pool, "connect", note)
    yield
    event.remove(Pool, "connect", note)
    for connection in seen:
        connection.close()


class PostgresServer:
    """A server with an empty database; `stop` and `start` it as often as a test needs."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pg"))  # Short: it holds a socket.
        if os.geteuid() == 0:
            shutil.chown(self._folder, _USER)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-A", "trust", "-U", _USER, "--no-sync", "-D", "data")
        self.start()

    @property
    def url(self) -> str:
        """The database's URL."""
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self._folder} -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-D", "data", "-l", "log", "-o", options)

    def stop(self) -> None:
        """Stop the server at once; its clients lose their connections."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", "data")

    def remove(self) -> None:
        """Stop the server, if it runs, and remove its files."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder)

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [str((_binaries() or Path()) / name), *arguments],
            cwd=self._folder,
            user=_USER if os.geteuid() == 0 else None,
            group=_USER if os.geteuid() == 0 else None,
            stdout=subprocess.DEVNULL,  # The server would keep a pipe open.
            check=True,
            timeout=60,
        )
