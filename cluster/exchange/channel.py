"""gRPC's settings for both ends of a stream."""

Options = list[tuple[str, int]]

UNLIMITED = -1
MAX_REQUEST_BYTES = 64 * 2**20
"""Size up to which a replica reads a message; some 13 million tokens in one step."""


def channel_options(keepalive_s: float) -> Options:
    """Options of a coordinator's channel: a connection of its own, no retries, no proxy, pings."""
    return [
        *_pings(keepalive_s),
        ("grpc.max_send_message_length", UNLIMITED),
        ("grpc.max_receive_message_length", UNLIMITED),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(keepalive_s: float) -> Options:
    """Options of a replica's server: the port is its alone, pings of any number are welcome."""
    return [
        *_pings(keepalive_s),
        ("grpc.max_send_message_length", UNLIMITED),
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _pings(keepalive_s: float) -> Options:
    # A peer that dies right after a ping is found after the next one has gone unanswered: two halves are the whole.
    half_ms = max(1, round(keepalive_s * 500))
    return [
        ("grpc.keepalive_time_ms", half_ms),
        ("grpc.keepalive_timeout_ms", half_ms),
        # Without this one a ping without an answer is borne for a minute, whatever the timeout above says.
        ("grpc.http2.ping_timeout_ms", half_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", half_ms // 2),
    ]
