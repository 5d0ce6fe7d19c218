"""What a foreign site, a name that is none, or a broken client could send to the page. Each is refused, and nothing comes of it."""

from __future__ import annotations

from urllib.parse import quote

from page_server import TOKEN

from gemma_grpo.monitor.web.guard import page_token

METHODS = ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "QUERY", "get", "FOO"]

FOREIGN = [
    *({"Origin": origin} for origin in ("null", "http://evil.com", "http://localhost", "https://localhost.evil.com", "file://", "http://127.0.0.1:1")),
    *({"Sec-Fetch-Site": site} for site in ("cross-site", "same-site", "anything")),
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script", "Sec-Fetch-Mode": "no-cors"},
]  # fmt: skip

NUMBERS = ["-1", "1.5", "1e3", "NaN", "", " ", "0x10", "\u0661", "9" * 16, "1_0", "true", "null", "1;2", "'", "%00"]
"""In place of a whole number that is not negative."""

UPWARDS = r".. ../ ../outside/secret ..%2f..%2fetc%2fpasswd %2e%2e%2f %252e%252e%252f ..\ ..%5c %c0%ae%c0%ae/ .%00./".split()  # noqa: SIM905
ROOTS = r"/etc/passwd //etc/passwd C:\Windows C:/Windows \\host\share file:///etc/passwd ~ ~root $HOME %2fetc%2fpasswd".split()  # noqa: SIM905
DEVICES = "CON NUL COM1 aux.txt . ... .git .lock one/ one/. one/.. one/../two one/recipe.yaml ./one".split()  # noqa: SIM905
ODD = [
    "\u2024\u2024",
    "\uff0e\uff0e\uff0f",
    "one\u200b",
    "ONE",
    "one ",
    " one",
    "one\0",
    "a" * 300,
    "%",
    "%%",
    "%zz",
    "one%00.json",
    "*",
    "?",
    "link",
]


def names_that_lead_out() -> list[str]:
    """Of runs, were a name a path; each as an address holds it, with its slashes and without."""
    mixed = [shape.format(up) for shape in ("one/{}", "{}/one", "one{}", "two{}") for up in UPWARDS]
    names = [*UPWARDS, *ROOTS, *DEVICES, *ODD, "linked", "[o]ne", *mixed]
    return list(dict.fromkeys(quote(name, safe=safe) for name in names for safe in ("/%", "")))


REFUSED_POSTS = [
    ({"Origin": None}, 403),
    *(({"Origin": origin}, 403) for origin in ("null", "http://evil.com", "http://localhost", "http://127.0.0.1.evil.com:80", "")),
    *(({"Content_Type": kind}, 415) for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")),
    ({"Content_Type": None}, 415),
    *(({"X_Page_Token": token}, 403) for token in (None, "", "x", TOKEN, page_token("another"))),
    ({"Cookie": None}, 403),
    ({"Sec_Fetch_Site": "cross-site"}, 403),
    ({"Sec_Fetch_Site": "same-site"}, 403),
    ({"Content_Length": "70000"}, 413),
]
"""What must not make the playground answer or count a vote: headers beside the usual ones, None for left out, and the refusal."""


def foreign_hosts(port: int) -> list[str]:
    names = [
        "evil.com",
        "127.0.0.1.evil.com",
        "localhost.evil.com",
        "evil.com#127.0.0.1",
        "evil.com@127.0.0.1",
        "127.0.0.2",
        "0.0.0.0",
        "0",
    ]
    names += [
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "[::ffff:127.0.0.1]",
        "[::]",
        "::1",
        "localhost.",
        "localhost%00",
        " ",
        "",
    ]
    names += ["127.0.0.1 evil.com", "xn--localhost-", "LOCALHOST.EVIL.COM", "[fe80::1]", "127.0.0.1,evil.com", "*", "null", "localhost/"]
    own = [
        f"127.0.0.1:{port + 1}",
        "127.0.0.1",
        "localhost",
        "[::1]",
        f"127.0.0.1:{port}0",
        f"127.0.0.1:0{port}",
        f"localhost:{port}:80",
        "localhost:80",
    ]
    return [*own, *names, *(f"{name}:{port}" for name in names)]


def broken_requests(port: int) -> list[bytes]:
    """Not HTTP, or HTTP that two servers could read in two ways, or far too much of it."""
    host = f"Host: localhost:{port}\r\n"
    get, post = f"GET / HTTP/1.1\r\n{host}", f"POST / HTTP/1.1\r\n{host}"
    chunked, inner = "Transfer-Encoding: chunked\r\n", "GET /api/runs HTTP/1.1\r\nHost: evil.com\r\n\r\n"
    heads = [
        *(f"GET / HTTP/9.9\r\n{host}", f"GET  / HTTP/1.1\r\n{host}", f"GET /\r\n{host}"),
        *(f"/ GET HTTP/1.1\r\n{host}", f"GET / http/1.1\r\n{host}", "PRI * HTTP/2.0\r\n", "CONNECT evil.com:443 HTTP/1.1\r\n"),
        *(f"GET {there} HTTP/1.1\r\nHost: evil.com\r\n" for there in ("http://evil.com/", "//evil.com/")),
        *(f"{get}Content-Length: {length}\r\n" for length in ("-1", "+5", "5, 6", "5\r\nContent-Length: 6", "0x5", "5 5", "", "9" * 30)),
        *(f"{get}Content-Length: 5\r\n{chunked}", f"{get}{chunked}Content-Length: 5\r\n", f"{get}{chunked}{chunked}"),
        *(f"{get}Transfer-Encoding: {how}\r\n" for how in ("xchunked", "chunked, identity", "identity, chunked", "gzip", "\x0bchunked")),
        *(f"{get}Transfer-Encoding : chunked\r\n", f"{get} folded: x\r\n", f"{get}\tfolded: x\r\n"),
        *(f"{get}{line}\r\n" for line in ("no colon", ": no name", "X: a\x00b", "X\x00: a", "X: a\rb", "X\r: a", "(): a")),
        *(f"{get}X: {'a' * 2**20}\r\n", get + "X: a\r\n" * 2**17, f"GET /{'a' * 2**17} HTTP/1.1\r\n{host}"),
        f"{get}Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        f"{get}Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\nSec-WebSocket-Version: 13\r\n",
    ]
    chunks = [
        *("ZZ\r\n", "-1\r\n", "0x5\r\nhello\r\n", "5;" + "a" * 2**17, "fffffffffffffffff\r\n"),
        *("5\r\nhelloXX0\r\n\r\n", "5\nhello\n0\n\n", "\x00"),
    ]
    bodies = [f"{post}{chunked}\r\n{chunk}" for chunk in chunks]
    smuggled = [f"{post}Content-Length: 4\r\n{chunked}\r\n0\r\n\r\n{inner}", f"{post}Content-Length: 0\r\n\r\n{inner}"]
    raw = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 100 + b"\r\n\r\n", b"\r\n" * 1000, b"\xff" * 4096, b"\n\n"]
    return [*raw, *(f"{head}\r\n".encode() for head in heads), *(text.encode() for text in (*bodies, *smuggled))]
