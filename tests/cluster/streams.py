"""Streams whose replica or ingress dies or falls silent in the middle: what the client gets is what it
would have got.

One of two replicas runs a request that came in at a node without a model. The replica is struck after a
given event, and the stream goes on; or the node that was asked, and the client comes back to another one
with the last event's id. The events must be those of an undisturbed run, one for one.
"""

import http.client
import json
import os
import re
import signal
import threading
import time

from nodes import Node, check, say, until, wait

TOKENS = 64
STREAM = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}}
SCHEMA = {"type": "object", "required": ["hosts", "name"], "additionalProperties": False, "properties": {
    "hosts": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 6}, "name": {"type": "string"}}}
GREEDY = ("/v1/completions", {"prompt": "Grapevine", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True})
CHAT = {"messages": [{"role": "user", "content": "Tell me a short story about Mia."}], "max_tokens": 200}
OTHERS = {
    "two seeded choices with log-probabilities": ("/v1/chat/completions", CHAT | {
        "n": 2, "seed": 7, "temperature": 0.9, "logprobs": True, "top_logprobs": 2}),
    "a JSON schema": ("/v1/chat/completions", CHAT | {"seed": 3, "temperature": 0.8, "response_format": {
        "type": "json_schema", "json_schema": {"name": "fleet", "schema": SCHEMA}}}),
    "a stop string": ("/v1/chat/completions", CHAT | {"temperature": 0, "stop": ["the end", ". The"]}),
}


class Slow:
    """Lets processes run for a moment now and then, so that an answer of a fast model takes seconds."""

    def __init__(self, nodes: list[Node], run_s: float = 0.0002, rest_s: float = 0.02):
        self.nodes, self.run_s, self.rest_s, self.ended = nodes, run_s, rest_s, threading.Event()
        # Held while signals are sent, so that nobody is woken who has been struck.
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.loop, daemon=True)

    def __enter__(self) -> "Slow":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join(timeout=10)

    def signal_all(self, number: int) -> None:
        with self.lock:
            # Nobody is stopped who would not be woken.
            if number == signal.SIGSTOP and self.ended.is_set():
                return
            for node in self.nodes:
                node.send(number)

    def loop(self) -> None:
        while not self.ended.wait(self.run_s):
            self.signal_all(signal.SIGSTOP)
            self.ended.wait(self.rest_s)
            self.signal_all(signal.SIGCONT)

    def strike(self, node: Node, number: int) -> None:
        """The last signal that the node gets from here; the others run as fast as they can again."""
        with self.lock:
            self.ended.set()
            self.nodes = [other for other in self.nodes if other is not node]
            for other in self.nodes:
                other.send(signal.SIGCONT)
            node.send(signal.SIGCONT)
            node.send(number)


class Events:
    """What a client has seen of a stream."""

    def __init__(self, request: tuple[str, dict], on_event=lambda count: None):
        self.path, self.body = request[0], STREAM | request[1]
        self.seen: list[str] = []
        self.last_id = ""
        self.times: list[float] = []
        self.on_event = on_event
        # Whether another node went on with it.
        self.moved = False

    def read(self, node: Node) -> "Events":
        """Asks, or comes back to what was begun; an error of the connection is the caller's."""
        headers = {"content-type": "application/json"} | ({"last-event-id": self.last_id} if self.last_id else {})
        connection = node.connect(60)
        try:
            connection.request("POST", self.path, json.dumps(self.body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"status {response.status}: {response.read()[:300]}")
            event_id = ""
            for line in response:
                if line.startswith(b"id: "):
                    event_id = line[4:].decode().strip()
                if line.startswith(b"data: ") and line.endswith(b"\n"):
                    self.last_id = event_id or self.last_id
                    number = event_id.rsplit(":", 1)[-1]
                    self.seen.append(f"{number} {plain(line[6:].decode().strip())}")
                    self.times.append(time.monotonic())
                    self.on_event(len(self.seen))
            if not self.is_whole():
                raise ValueError(f"the stream ended after {self.seen[-1:]}")
            return self
        finally:
            connection.close()

    def is_whole(self) -> bool:
        return bool(self.seen) and self.seen[-1].endswith("[DONE]")

    def pause(self) -> float:
        """The longest time between two events."""
        return max((later - sooner for sooner, later in zip(self.times, self.times[1:])), default=0.0)


def plain(data: str) -> str:
    """Without the request's id, the time, and what only says whose cache was warm."""
    if data == "[DONE]":
        return data
    chunk = json.loads(data)
    for key in ("id", "created"):
        chunk.pop(key, None)
    (chunk.get("usage") or {}).pop("prompt_tokens_details", None)
    # Calls of tools would be named after the request, too.
    return re.sub(r"call_[0-9A-Za-z]+", "call", json.dumps(chunk, sort_keys=True))


BROKEN = (OSError, ValueError, http.client.HTTPException)


def replica_struck(nodes: list[Node], request: tuple[str, dict], at: int, number: int) -> Events:
    """A stream through the entrance whose replica is struck once `at` events have come."""
    a, b, entrance, _ = nodes
    victims, counted = [], continued(entrance)
    with Slow([a, b]) as slow:
        before = {node.name: worked(node) for node in (a, b)}

        def on_event(count: int) -> None:
            if count == 1 and request is not GREEDY:
                victims.extend(node for node in (a, b) if running(node))
            if count == at + 1:
                # The greedy answer would be out before anyone is asked: it is who has worked more.
                if not victims:
                    victims.append(max((a, b), key=lambda node: worked(node) - before[node.name]))
                slow.strike(victims[0], number)

        stream = Events(request, on_event)
        try:
            stream.read(entrance)
        except BROKEN as error:
            stream.seen.append(f"{type(error).__name__}: {error}")
    stream.moved = continued(entrance) > counted
    for victim in victims:
        revive(victim, number)
    return stream


def ingress_struck(nodes: list[Node], request: tuple[str, dict], at: int, number: int) -> Events:
    """A stream whose client comes back to another node when the one that it asked is struck. By turns
    that has a model itself."""
    a, b, entrance, other = nodes
    asked = a if at % 2 else entrance
    with Slow([a, b]) as slow:

        def on_event(count: int) -> None:
            if count == at + 1:
                slow.strike(asked, number)
                raise ConnectionAbortedError("the client lets go")

        stream = Events(request, on_event)
        try:
            stream.read(asked)
            stream.seen.append("the client was to come back")
        except ConnectionAbortedError:
            stream.on_event, stream.moved = lambda count: None, True
            try:
                stream.read(other)
            except BROKEN as error:
                stream.seen.append(f"{type(error).__name__}: {error}")
        except BROKEN as error:
            stream.seen.append(f"{type(error).__name__}: {error}")
    revive(asked, number)
    return stream


def revive(node: Node, number: int) -> None:
    if number == signal.SIGSTOP:
        node.send(signal.SIGCONT)
    else:
        node.kill()
        node.start()


def continued(node: Node) -> int:
    """Streams with which another replica went on, as the entrance counts them."""
    name = 'grapevine_streams_continued_total{outcome="continued"} '
    lines = [line for line in node.get("/metrics").splitlines() if line.startswith(name)]
    return int(lines[0].split()[-1]) if lines else 0


def worked(node: Node) -> int:
    """Nanoseconds that its threads have run."""
    tasks = f"/proc/{node.process.pid}/task"
    return sum(int(open(f"{tasks}/{task}/schedstat").read().split()[0]) for task in os.listdir(tasks))


def running(node: Node) -> bool:
    try:
        return node.running() > 0
    except BROKEN:
        return False


def by_choice(events: list[str]) -> list:
    """Events of each choice in their order: which choice comes first in a step is not promised."""
    choices: dict[int, list[str]] = {}
    for event in events:
        found = re.search(r'"index": (\d+)', event)
        choices.setdefault(int(found.group(1)) if found else -1, []).append(event.split(" ", 1)[-1])
    return [[event.split(" ", 1)[0] for event in events], choices]


def survive(nodes: list[Node], every: int) -> None:
    """Strikes at each `every`th event of a greedy answer, and a few times in each other kind of answer.
    `nodes`: two with the model, two without."""
    entrance, other = nodes[2:]
    both = lambda: replicas(entrance) == 2 and replicas(other) == 2
    until("both replicas are known", 20, both)
    for what, request in {"greedy": GREEDY, **OTHERS}.items():
        whole = Events(request).read(entrance).seen
        check(f"{what}: an undisturbed answer", len(whole) > 8, f"{len(whole)} events")
        # The last events may be out before anyone can be struck.
        last = len(whole) - 6
        places = range(0, last, every if request is GREEDY else max(1, last // 2))
        for who, strike in [("replica", replica_struck), ("ingress", ingress_struck)]:
            for name, number in [("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)]:
                pauses, wrong, moved = [], [], 0
                for at in places:
                    stream = strike(nodes, request, at, number)
                    pauses.append(stream.pause())
                    moved += stream.moved
                    if by_choice(stream.seen) != by_choice(whole):
                        wrong.append((at, difference(stream.seen, whole)))
                    wait(30, both)
                check(f"{what}: the {who} gets {name} after each of {len(places)} events, and the events are the same",
                      not wrong, f"{len(wrong)} not: {wrong[:2]}" if wrong else "")
                check("and streams went on elsewhere", moved > 0, f"{moved} of {len(places)}, the others were out already")
                say(f"longest pause of each: {min(pauses):.2f} to {max(pauses):.2f} s")


def replicas(entrance: Node) -> int:
    """Replicas of the model that the entrance could ask now."""
    return sum(peer["state"] == "alive" and any(m["state"] == "ready" for m in peer["models"] or []) for peer in entrance.peers())


def difference(seen: list[str], whole: list[str]) -> str:
    for number, (one, other) in enumerate(zip(seen, whole)):
        if one != other:
            return f"event {number} is {one[:200]}, not {other[:200]}"
    return f"{len(seen)} events instead of {len(whole)}: {seen[-1][:200] if seen else 'none'}"
