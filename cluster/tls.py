"""Mutual TLS between the processes of a cluster, with the files that Ray itself uses.

Beyond one machine an operator gives Ray certificates: RAY_USE_TLS=1, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and
RAY_TLS_CA_CERT, in the environment of `ray start`. The same four switch on TLS for everything of `cluster` that travels
between nodes, so that there is one place to say it and no way to secure Ray and forget the rest.

Both ends show a certificate that the authority has signed. Whoever connects also checks that the other's names hold the
address that it connected to, as Ray does: a node's certificate needs its IP address among its alternative names.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.errors import InvalidConfiguration

SWITCH = "RAY_USE_TLS"
FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """A node's certificate, its key, and the authority that all nodes trust: files in PEM."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Tls | None":
        """Return what Ray's variables name; none where Ray uses no TLS.

        Raises:
            InvalidConfiguration: a variable is missing.
        """
        if environment.get(SWITCH, "0").lower() not in ("1", "true"):
            return None
        missing = [name for name in FILES if not environment.get(name)]
        if missing:
            raise InvalidConfiguration(f"{SWITCH} is set, but {missing[0]} is not; name the file, as Ray needs it too")
        certificate, key, authority = (Path(environment[name]) for name in FILES)
        return cls(certificate=certificate, key=key, authority=authority)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return what a gRPC server shows and asks for.

        Raises:
            InvalidConfiguration: a file cannot be read.
        """
        pair = _read(self.key), _read(self.certificate)
        return grpc.ssl_server_credentials([pair], _read(self.authority), require_client_auth=True)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return what a gRPC client shows and asks for.

        Raises:
            InvalidConfiguration: a file cannot be read.
        """
        return grpc.ssl_channel_credentials(_read(self.authority), _read(self.key), _read(self.certificate))

    def server_context(self) -> ssl.SSLContext:
        """Return what a server of Python's own streams shows and asks for.

        Raises:
            InvalidConfiguration: a file cannot be used.
        """
        context = self._context(ssl.Purpose.CLIENT_AUTH)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return what a client of Python's own streams shows and asks for.

        Raises:
            InvalidConfiguration: a file cannot be used.
        """
        return self._context(ssl.Purpose.SERVER_AUTH)

    def _context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(purpose, cafile=self.authority)
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:
            files = f"{self.certificate}, {self.key} or {self.authority}"
            raise InvalidConfiguration(f"TLS: {files} cannot be used: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        return context


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidConfiguration(f"TLS: {file} cannot be read: {error.strerror}") from error
