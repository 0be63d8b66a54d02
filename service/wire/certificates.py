"""Whom a server's certificate may be from."""

import os
import ssl


def certificates() -> ssl.SSLContext | bool:
    """For httpx: those in $SSL_CERT_FILE, where a team has an authority of its own."""
    own = os.environ.get("SSL_CERT_FILE")
    return ssl.create_default_context(cafile=own) if own else True
