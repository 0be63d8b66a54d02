"""JSON web tokens in the place of keys: `sub` is the owner, `role` what it may do."""

import base64
import hashlib
import hmac
import json
from typing import Any

from plait.service.errors import ServiceError
from plait.service.keys import ROLES, Caller

_LONGEST = 200


def caller_of_token(token: str, secret: str, now: float) -> Caller:
    """
    Raises:
        ServiceError: it is not signed with the secret by HS256, is over, or says no owner.
    """
    try:
        head, claims, signature = token.split(".")
        signed = hmac.new(secret.encode(), f"{head}.{claims}".encode(), hashlib.sha256).digest()
        if not hmac.compare_digest(signed, _decoded(signature)):
            raise ServiceError("this token is not signed by who may sign", 401)
        if _object(head).get("alg") != "HS256":
            raise ServiceError("tokens are signed by HS256", 401)
        said = _object(claims)
    except (ValueError, RecursionError) as error:
        raise ServiceError("this is no JSON web token", 401) from error
    owner = said.get("sub")
    if not isinstance(owner, str) or not 0 < len(owner) <= _LONGEST or not owner.isprintable():
        raise ServiceError(f"a token says its owner in sub, in up to {_LONGEST} letters", 401)
    if not _seconds(said.get("exp")) or not now < said["exp"]:
        raise ServiceError("this token is over, or says no end (exp)", 401)
    begins = said.get("nbf", 0)
    if not _seconds(begins) or not begins <= now:
        raise ServiceError("this token is not valid yet (nbf)", 401)
    role = said.get("role", "user")
    if role not in ROLES:
        raise ServiceError(f"a token's role is one of {', '.join(ROLES)}", 401)
    return Caller(owner, role, "jwt")


def _object(part: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no JSON object.
    """
    said = json.loads(_decoded(part))
    if not isinstance(said, dict):
        raise ValueError("a part of a token is an object")
    return said


def _seconds(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
