"""Web pages of other origins that may ask the service from a browser (CORS, https://fetch.spec.whatwg.org)."""

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from serving.settings import Settings

_SENT = ("Accept", "Authorization", "Content-Type", "X-Request-Id", "traceparent")
_READ = ("Location", "Retry-After", "Server-Timing", "X-Bundle-Id", "X-Class-Areas", "X-Confidence", "X-Request-Id")


def admit(application: ASGIApp, settings: Settings) -> ASGIApp:
    """The application, which tells browsers that pages of the set origins may ask it; as it is where there are none.

    No cookies and no passwords of a browser are asked for: a page sends its token itself, in a header.
    """
    if not settings.origins:
        return application
    return CORSMiddleware(
        application,
        allow_origins=settings.origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=_SENT,
        expose_headers=_READ,
    )
