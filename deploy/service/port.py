"""The HTTP port while a service starts: whether it is free, who holds it, and when the service answers there.

Serve opens its port so that others can open it too (SO_REUSEPORT): two services on one would share its requests in
silence. Holds no model, and calls nothing of Ray.
"""

import errno
import json
import os
import pwd
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cluster.errors import InvalidConfiguration
from deploy.http.access.exposure import Listener, is_loopback, read_listeners

POLL_S = 1.0
"""Between two looks whether a service answers."""

ANSWER_S = 5.0
"""For an answer about a service's health."""

MAX_COMMAND_CHARS = 80

PROXY = "ray::ProxyActor"
"""What Ray calls the process in which Serve listens for HTTP."""


class HttpOptions(Protocol):
    """What this module reads of Serve's `http_options`."""

    host: str
    port: int
    root_path: str
    ssl_certfile: str | None


def names_a_cluster(environment: Mapping[str, str]) -> bool:
    """Whether RAY_ADDRESS names a cluster that may be on other machines; else it is found or started on this one."""
    address = environment.get("RAY_ADDRESS", "auto")
    host = address.rpartition("://")[2].rpartition(":")[0]
    return address not in ("", "auto", "local") and not is_loopback(host)


def check_port(host: str, port: int) -> None:
    """Check that HTTP can be served at an address of this machine.

    Raises:
        InvalidConfiguration: it cannot: the port is taken, and by whom where the system tells; or the address is not
            of this machine, or the port is kept for others.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidConfiguration(
            f"http_options.host: {host!r} is no address: {error.strerror}; set it to 127.0.0.1, or to one of this "
            "machine's addresses"
        ) from error
    refusals = [refusal for family, kind, _, _, place in places if (refusal := _bind(family, kind, place)) is not None]
    for refusal in refusals:
        if refusal.errno == errno.EADDRINUSE:
            raise InvalidConfiguration(f"http_options.port: {host} port {port} is taken{_holder(port)}") from refusal
    # A name may have an address of a kind that this machine lacks.
    if len(refusals) == len(places):
        key, remedy = "host", "set it to 127.0.0.1, or to one of this machine's addresses"
        if refusals[0].errno == errno.EACCES:
            key, remedy = "port", "set it to 1024 or more"
        raise InvalidConfiguration(
            f"http_options.{key}: {host} port {port} cannot be opened: {refusals[0].strerror}; {remedy}"
        ) from refusals[0]


def _bind(family: int, kind: int, place: Any) -> OSError | None:
    """Open a port for a moment, as one who does not share it; return what is against it."""
    try:
        with socket.socket(family, kind) as probe:
            # Connections of a service that has just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        return error
    return None


def _holder(port: int) -> str:
    """Who listens on a port, as far as the system tells, and what to do about it."""
    listeners = [listener for listener in read_listeners() if listener.port == port]
    for listener in listeners:
        process = _process_of(listener)
        if process is not None:
            command = _command(process)
            if command.startswith(PROXY):
                return (
                    f" by a service of Ray Serve's ({command}, process {process}): end that one (`serve shutdown`, or "
                    "Ctrl-C where it runs), update it (`serve deploy`), or set another port"
                )
            return f" by process {process} ({command}): end it, or set another port"
    owners = ", ".join(sorted({_user(listener.user) for listener in listeners}))
    return f"{f' by a process of {owners}' if owners else ''}: end what listens there, or set another port"


def _process_of(listener: Listener) -> int | None:
    """The process that has a listening socket open; none where it is not ours to see."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            with os.scandir(folder) as entries:
                if any(os.readlink(entry.path) == f"socket:[{listener.inode}]" for entry in entries):
                    return int(folder.parent.name)
        except OSError:
            continue
    return None


def _command(process: int) -> str:
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return "it has just ended"
    words = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return words if len(words) <= MAX_COMMAND_CHARS else f"{words[:MAX_COMMAND_CHARS]}..."


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def url_of(options: HttpOptions) -> str:
    """Return the address at which this machine reaches a service."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    scheme = "http" if options.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{options.port}{options.root_path.rstrip('/')}"


def announce(url: str, say: Callable[[str], None], *, poll_s: float = POLL_S) -> None:
    """Wait until a service can be used, however long that takes; say what it waits for, and when it is ready."""
    said: list[str] | None = None
    while (missing := _missing(url)) != []:
        if missing is not None and missing != said:
            say(f"waiting for {', '.join(missing)}")
            said = missing
        time.sleep(poll_s)
    say(f"ready at {url}")


def _missing(url: str) -> list[str] | None:
    """The applications that a service waits for; none while it does not answer."""
    context = ssl.create_default_context()
    # Of a server whose port is this machine's own.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(f"{url}/health", timeout=ANSWER_S):
            return []
    except urllib.error.HTTPError as error:
        try:
            answer = json.loads(error.read())
        except (OSError, ValueError):
            return None
        missing = answer.get("missing") if isinstance(answer, Mapping) else None
        return missing or None
    except OSError:
        return None
