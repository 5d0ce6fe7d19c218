"""A run's model behind a pipe: `python -m gemma_grpo.grpo.play_worker RUN`, a line of JSON for each request and for each thing said.

For the page, which loads no torch and must survive whatever a model does. Requests: {"id", "checkpoint", "messages", "sides", "seed",
"max_tokens", "temperature"} and {"cancel": id}. Said, each with the request's id: "piece" with its side, "reply" with its side, at the end
"done", or "error". It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from gemma_grpo.grpo.playing import Player, Reply
from gemma_grpo.model.memory import DoesNotFitError


class Requests:
    """What is asked on standard input, read while a reply is written, so that it can be called off."""

    def __init__(self, lines: TextIO) -> None:
        self._waiting: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self.called_off: int | None = None
        """The request that was called off last; what is asked has rising numbers."""
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            request = json.loads(line)
            if "cancel" in request:
                self.called_off = request["cancel"]
            else:
                self._waiting.put(request)
        self._waiting.put(None)
        self.called_off = sys.maxsize  # nobody is left to read

    def next(self) -> Mapping[str, Any] | None:
        """The next request, None after the last."""
        return self._waiting.get()

    def is_off(self, number: int) -> bool:
        """Whether the request of that number was called off."""
        return self.called_off is not None and self.called_off >= number


def serve(player: Player, requests: Requests, out: TextIO) -> None:
    """Answer until there are no more requests."""

    def say(**told: Any) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    say(ready=str(player.model.device))
    while (request := requests.next()) is not None:
        number = request["id"]
        try:
            if player.choice is None or player.choice.name != request["checkpoint"]:
                player.choose(request["checkpoint"])
            for side in request["sides"]:
                _answer(player, request, side, requests, say)
            say(id=number, done=True)
        except (ValueError, ArithmeticError, DoesNotFitError, OSError) as error:
            say(id=number, error=str(error))


def _answer(player: Player, request: Mapping[str, Any], side: Any, requests: Requests, say: Any) -> None:
    messages, number = request["messages"], request["id"]
    settings = {name: request[name] for name in ("seed", "max_tokens", "temperature")}
    for piece in player.stream(messages, side, **settings, stop=lambda: requests.is_off(number)):
        if isinstance(piece, str):
            say(id=number, side=side, piece=piece)
            continue
        say(id=number, side=side, reply=_told(piece), opinion=None if requests.is_off(number) else asdict(player.opinion(messages, piece)))


def _told(reply: Reply) -> dict[str, Any]:
    return {
        "text": reply.text,
        "pieces": reply.pieces,
        "log_ratios": [round(ratio, 4) for ratio in reply.log_ratios],
        "finish": reply.finish,
        "length": reply.length,
        "left_out": reply.left_out,
    }


def main() -> None:
    """Load the run, say "ready" or why not, and answer."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    run, checkpoint, beside = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["--beside"]
    requests = Requests(sys.stdin)
    try:
        player = Player.open(run, checkpoint, beside=beside)
    except (ValueError, ArithmeticError, DoesNotFitError, OSError) as error:
        out.write(json.dumps({"refused": str(error)}) + "\n")
        out.flush()
        return
    serve(player, requests, out)


if __name__ == "__main__":
    main()
