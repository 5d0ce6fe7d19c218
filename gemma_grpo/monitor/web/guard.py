"""What stands before every request: who may ask, what for, how much at a time; and what every answer says to the browser.

An ASGI wrapper around the whole application, so that errors pass through it too. Threats: a page of another site (Host, Origin, cookie),
another user of this machine (the token), model text that turns into script (the security policy), and too much of anything.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; frame-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; sandbox"
"""The report's: its styles are in its text, it has no script, and the page shows it in a frame."""
SAFE_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_READING = ("GET", "HEAD")
_WITHOUT_TOKEN = "Open the whole link that `gemma-grpo watch` printed, with its token."
_CHANGING = re.compile(r"/api/runs/[^/]+/(play|votes)")
LONGEST_QUERY = 4096
LARGEST_BODY = 2**16


def page_token(token: str) -> str:
    """What the page sends with every request that changes something; it cannot read the cookie, and another site cannot read this."""
    return hmac.new(token.encode(), b"page", "sha256").hexdigest()


class Guard:
    """Lets a request through to `app`, or answers it.

    `hosts` are the values of Host that are this server's own, with the port. A request needs the token once, as `?token=` of the first
    page, and from then on the cookie that this sets. The page takes the token out of its address itself: a redirect would lose the
    cookie of whoever followed a link on another site.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], token: str, port: int) -> None:
        self.app, self.hosts, self.token = app, frozenset(host.lower() for host in hosts), token
        self.cookie = f"gemma-grpo-{port}"  # cookies are not kept apart by port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web socket is served
            await send({"type": "websocket.close", "code": 1008})
            return

        brought = scope["path"] == "/" and self._same(_token_in(scope))
        known = brought or self._same(self._cookie_of(scope))
        answer = self._refused(scope) or (None if known else _said(403, _WITHOUT_TOKEN))

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                if brought and answer is None:
                    headers.append("set-cookie", f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        await (answer or self.app)(scope, receive, send_safely)

    def _refused(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return _said(421, "This server is not reached by that name. Use the link that `gemma-grpo watch` printed.")
        if len(scope["query_string"]) > LONGEST_QUERY:
            return _said(414, "The address is too long.")
        if scope["method"] == "POST" and _CHANGING.fullmatch(scope["path"]):
            if refusal := self._may_change(headers):
                return refusal
        elif scope["method"] not in _READING:
            return PlainTextResponse("Only reading is served here.", 405, {"allow": ", ".join(_READING)})
        origin, follows_link = headers.get("origin"), scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"
        foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not follows_link
        if foreign or (origin is not None and urlsplit(origin).netloc.lower() not in self.hosts):
            return _said(403, "Pages of other sites may not read this one.")
        return None

    def _may_change(self, headers: Headers) -> Response | None:
        """What a form or a script of another site cannot send: an own Origin, JSON, and a token that only this page can read."""
        origin = headers.get("origin")
        if origin is None or urlsplit(origin).netloc.lower() not in self.hosts:
            return _said(403, "Pages of other sites may not ask for that.")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return _said(415, "Ask in JSON.")
        if not hmac.compare_digest(headers.get("x-page-token", "").encode("utf-8", "replace"), page_token(self.token).encode()):
            return _said(403, "This page is of an earlier start of the server. Reload it.")
        length = headers.get("content-length", "")
        if not length.isdigit():
            return _said(411, "Say how long the question is.")
        return _said(413, f"That is more than {LARGEST_BODY} bytes.") if len(length) > 9 or int(length) > LARGEST_BODY else None

    def _cookie_of(self, scope: Scope) -> str:
        try:
            morsel = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return str(morsel.value) if morsel else ""

    def _same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def _token_in(scope: Scope) -> str:
    return str(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0])


def _said(status: int, text: str) -> Response:
    return PlainTextResponse(text + "\n", status)
