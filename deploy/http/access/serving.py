"""Where Serve serves HTTP, as its controller and its own switches say. The only place that reads Serve's internals."""

from ray.serve._private import constants
from ray.serve.context import _get_global_client

from deploy.http.access.exposure import Ports


def http_ports() -> Ports | None:
    """Return where the Serve instance of this Ray cluster serves HTTP; none if it does not."""
    options = _get_global_client().http_config
    if options.host is None:
        return None
    direct = range(0)
    if constants.RAY_SERVE_ENABLE_DIRECT_INGRESS:
        first, last = constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT
        direct = range(first, last + 1)
    return Ports(host=options.host, port=options.port, direct=direct)
