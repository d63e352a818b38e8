"""Prompts that one node computes and another goes on with, while nodes die: what the client gets is what
a node alone gives.

`p` prefills, `d1` and `d2` decode, `e1` and `e2` are entrances without a model. A node that is in no mesh says what
is right.
"""

import json
import random
import re
import signal
import threading
import time

from nodes import Node, check, say, until, wait
from streams import BROKEN, Events, Slow, by_choice, continued, difference, revive, worked

TOKENS = 64
WORDS = ["vine", "wall", "stone", "river", "light", "north", "table", "cloud", "glass", "night", "bread", "field"]
# Whatever is drawn, it is over within the tokens of an answer.
SCHEMA = {"type": "object", "required": ["hosts", "name"], "additionalProperties": False, "properties": {
    "hosts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 3, "maxItems": 6},
    "name": {"type": "string", "maxLength": 12}}}
JSON_KIND = "a JSON schema"
KINDS = {
    "greedy": {"temperature": 0},
    "two seeded choices": {"n": 2, "seed": 11, "temperature": 0.9, "logprobs": 2},
    JSON_KIND: {"n": 2, "seed": 3, "temperature": 0.8, "max_tokens": 200, "response_format": {
        "type": "json_schema", "json_schema": {"name": "fleet", "schema": SCHEMA}}},
}


def long_request(number: int, extra: dict) -> tuple[str, dict]:
    """A prompt of some 200 tokens that nobody has seen yet."""
    drawn = random.Random(number)
    prompt = f"Story {number}: " + " ".join(drawn.choice(WORDS) for _ in range(120))
    if "response_format" in extra:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]} | extra
    return "/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True} | extra


def keeps_schema(events: list[str]) -> bool:
    """Whether each choice of a chat is an object as the schema wants it."""
    texts: dict[int, str] = {}
    for event in events:
        data = event.split(" ", 1)[-1]
        for choice in json.loads(data).get("choices", []) if data != "[DONE]" else []:
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
    try:
        fleets = [json.loads(text) for text in texts.values()]
        return len(fleets) == 2 and all(
            set(fleet) == {"hosts", "name"} and 3 <= len(fleet["hosts"]) <= 6 and len(fleet["name"]) <= 12
            and all(isinstance(host, int) and 0 <= host <= 999 for host in fleet["hosts"]) for fleet in fleets)
    except (ValueError, TypeError):
        return False


def counter(node: Node, line: str) -> float:
    found = [l for l in node.get("/metrics").splitlines() if l.startswith(line)]
    return float(found[0].split()[-1]) if found else 0.0


def handed_over(node: Node, outcome: str) -> float:
    return counter(node, f'grapevine_kv_hand_offs_total{{outcome="{outcome}"}}')


def used_blocks(node: Node) -> float:
    lines = [l for l in node.get("/metrics").splitlines() if l.startswith("grapevine_kv_blocks{") and 'state="used"' in l]
    return sum(float(line.split()[-1]) for line in lines)


# A process that has run for so long has its threads, connections and buffers, and not yet all of its pool's pages: 16 MiB
# are touched as they are first used.
WARM_UP_S = 5
# Seen are some 5 MiB beside the pool.
GROWTH_MIB = 40


class Fleet:
    def __init__(self, alone: Node, nodes: list[Node]):
        self.alone, self.nodes = alone, nodes
        self.p, self.d1, self.d2, self.e1, self.e2 = nodes
        self.number = 0

    def request(self, extra: dict) -> tuple[tuple[str, dict], list[str]]:
        """A new request, and the events of its answer."""
        self.number += 1
        request = long_request(self.number, extra)
        whole = Events(request).read(self.alone).seen
        if "response_format" in extra and not keeps_schema(whole):
            check("an answer keeps to its schema", False, whole)
        return request, whole

    def ready(self) -> bool:
        """Every node sees all three replicas."""
        def replicas(node: Node) -> int:
            return sum(peer["state"] == "alive" and any(m["state"] == "ready" for m in peer["models"] or [])
                       for peer in node.peers())
        return all(replicas(node) == 3 for node in self.nodes)

    def settled(self) -> bool:
        return all(used_blocks(node) == 0 for node in (self.p, self.d1, self.d2))


def same(fleet: Fleet) -> None:
    """Undisturbed: answers are those of a node alone, and prompts are computed by the prefiller."""
    for kind, extra in KINDS.items():
        before = sum(handed_over(node, "complete") for node in (fleet.d1, fleet.d2))
        wrong = []
        for place in range(8):
            request, whole = fleet.request(extra)
            seen = Events(request).read([fleet.e1, fleet.d1, fleet.d2][place % 3]).seen
            if by_choice(seen) != by_choice(whole):
                wrong.append(difference(seen, whole))
        check(f"{kind}: 8 answers are those of a node alone", not wrong, wrong[:1] if wrong else "")
        done = sum(handed_over(node, "complete") for node in (fleet.d1, fleet.d2)) - before
        # A machine that stands still for a second makes a decoder compute a prompt itself.
        check("and their prompts came from the prefiller", done >= 6, f"{done:.0f} hand-offs")
    until("no block is left in use", 10, fleet.settled)


def prefiller_struck(fleet: Fleet, places: int) -> None:
    """The prefiller dies or falls silent at some moment of the hand-off."""
    for name, number in [("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)]:
        wrong, firsts = [], []
        outcomes = lambda: [sum(handed_over(node, o) for node in (fleet.d1, fleet.d2)) for o in ("complete", "incomplete", "deadline")]
        before = outcomes()
        for place in range(places):
            request, whole = fleet.request(KINDS["greedy"])
            stream = Events(request)
            with Slow([fleet.p], rest_s=0.01) as slow:
                # Slowed down like this, the prefiller takes up to a third of a second.
                struck = threading.Timer(place * 0.3 / places, lambda: slow.strike(fleet.p, number))
                struck.start()
                asked = time.monotonic()
                try:
                    stream.read(fleet.d1)
                    firsts.append(stream.times[0] - asked)
                except BROKEN as error:
                    stream.seen.append(f"{type(error).__name__}: {error}")
                struck.join()
            if by_choice(stream.seen) != by_choice(whole):
                wrong.append((place, difference(stream.seen, whole)))
            revive(fleet.p, number)
            wait(30, fleet.ready)
        complete, incomplete, late = (after - b for after, b in zip(outcomes(), before))
        check(f"the prefiller gets {name} at {places} moments, and the answers are the same", not wrong,
              f"{len(wrong)} not: {wrong[:2]}" if wrong else f"{complete:.0f} hand-offs complete, {incomplete + late:.0f} broken off")
        # A few moments may all miss.
        if places >= 32:
            check("and some hand-offs were really broken off", incomplete + late > 0)
        say(f"first event after {min(firsts, default=0):.2f} to {max(firsts, default=0):.2f} s")
    until("no block is left in use", 20, fleet.settled)


def decoder_or_ingress_struck(fleet: Fleet, every: int) -> None:
    """A decoder, or the entrance, is struck after each `every`th event of an answer whose prompt came from the
    prefiller."""
    for who in ("decoder", "ingress"):
        for name, number in [("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)]:
            for kind in KINDS:
                wrong, pauses, before = [], [], continued(fleet.e1)
                places = range(0, TOKENS - 6, every)
                if kind != "greedy":
                    # An answer to a schema may have no more than 40 events. A stopped node is noticed after some seconds.
                    places = range(1, 36, 11) if number == signal.SIGKILL else [20]
                    if who == "ingress" and every > 1:
                        continue
                for at in places:
                    request, whole = fleet.request(KINDS[kind])
                    stream = strike(fleet, request, who, at, number)
                    pauses.append(stream.pause())
                    if by_choice(stream.seen) != by_choice(whole):
                        wrong.append((at, difference(stream.seen, whole)))
                    wait(30, fleet.ready)
                check(f"{kind}: the {who} gets {name} after each of {len(places)} events, and the events are the same",
                      not wrong, f"{len(wrong)} not: {wrong[:2]}" if wrong else "")
                if who == "decoder" and number == signal.SIGKILL:
                    moved = continued(fleet.e1) - before
                    check("and streams went on elsewhere", moved > 0, f"{moved} of {len(places)}")
                say(f"longest pause of each: {min(pauses):.2f} to {max(pauses):.2f} s")
    until("no block is left in use", 20, fleet.settled)


def strike(fleet: Fleet, request: tuple[str, dict], who: str, at: int, number: int) -> Events:
    decoders, victims = [fleet.d1, fleet.d2], [fleet.e1] if who == "ingress" else []
    with Slow(decoders) as slow:
        before = {node.name: worked(node) for node in decoders}

        def on_event(count: int) -> None:
            if count == at + 1:
                # The entrance's choice is who has worked more.
                if not victims:
                    victims.append(max(decoders, key=lambda node: worked(node) - before[node.name]))
                slow.strike(victims[0], number)
                if who == "ingress":
                    raise ConnectionAbortedError("the client lets go")

        stream = Events(request, on_event)
        try:
            stream.read(fleet.e1)
        except ConnectionAbortedError:
            stream.on_event = lambda count: None
            try:
                stream.read(fleet.e2)
            except BROKEN as error:
                stream.seen.append(f"{type(error).__name__}: {error}")
        except BROKEN as error:
            stream.seen.append(f"{type(error).__name__}: {error}")
    for victim in victims:
        revive(victim, number)
    return stream


class Memory(threading.Thread):
    """Looks again and again at how much memory each process has."""

    def __init__(self, nodes: list[Node]):
        super().__init__(daemon=True)
        self.nodes, self.over = nodes, threading.Event()
        # By name and process: when it was seen first; MiB after its warm-up and last.
        self.seen: dict[tuple[str, int], float] = {}
        self.warm: dict[tuple[str, int], float] = {}
        self.last: dict[tuple[str, int], tuple[float, float]] = {}

    def run(self) -> None:
        while not self.over.wait(0.25):
            self.look()

    def look(self) -> None:
        now = time.monotonic()
        for node in self.nodes:
            if not (process := node.process):
                continue
            key = (node.name, process.pid)
            try:
                with open(f"/proc/{process.pid}/status") as status:
                    resident = re.search(r"^VmRSS:\s+(\d+) kB", status.read(), re.M)
            except OSError:
                continue
            # A process that has ended has no memory.
            if not resident:
                continue
            mib = int(resident.group(1)) / 1024
            if now - self.seen.setdefault(key, now) >= WARM_UP_S:
                self.warm.setdefault(key, mib)
                self.last[key] = (now, mib)

    def check(self) -> None:
        self.over.set()
        self.join(timeout=10)
        self.look()
        grown = {key: self.last[key][1] - warm for key, warm in self.warm.items() if self.last[key][0] - self.seen[key] >= 2 * WARM_UP_S}
        for key in sorted(grown):
            life = self.last[key][0] - self.seen[key]
            say(f"{key[0]}, process {key[1]}: {self.warm[key]:.1f} MiB after {WARM_UP_S} s, {self.last[key][1]:.1f} MiB after {life:.0f} s")
        check(f"no process grows by {GROWTH_MIB} MiB", bool(grown) and max(grown.values()) < GROWTH_MIB,
              f"at most by {max(grown.values(), default=0):.1f} MiB")


class Client(threading.Thread):
    """Asks again and again, at any entrance, until the work is done; comes back where a stream breaks."""

    def __init__(self, fleet: Fleet, work: list, results: list, lock: threading.Lock):
        super().__init__(daemon=True)
        self.fleet, self.work, self.results, self.lock = fleet, work, results, lock

    def run(self) -> None:
        drawn = random.Random(id(self))
        while True:
            with self.lock:
                if not self.work:
                    return
                request, whole = self.work.pop()
            stream, errors = Events(request), []
            for _ in range(12):
                try:
                    stream.read(drawn.choice([self.fleet.e1, self.fleet.e2, self.fleet.d1, self.fleet.d2]))
                    break
                except BROKEN + (TypeError, AttributeError) as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    time.sleep(0.5)
            with self.lock:
                self.results.append((stream, whole, errors))


def chaos(fleet: Fleet, requests: int, clients: int, every_s: float) -> None:
    """Many requests while a random node is killed now and then, and started again."""
    work = [fleet.request(list(KINDS.values())[k % len(KINDS)]) for k in range(requests)]
    memory = Memory(fleet.nodes)
    memory.start()
    results, lock = [], threading.Lock()
    threads = [Client(fleet, work, results, lock) for _ in range(clients)]
    drawn, killed, over = random.Random(7), {}, threading.Event()

    def kill_now_and_then() -> None:
        while not over.wait(every_s):
            victim = drawn.choice(fleet.nodes)
            killed[victim.name] = killed.get(victim.name, 0) + 1
            victim.kill()
            over.wait(0.5)
            victim.start()

    began = time.monotonic()
    # Fast answers would all be out before the first kill.
    with Slow([fleet.d1, fleet.d2, fleet.p], run_s=0.001):
        killer = threading.Thread(target=kill_now_and_then, daemon=True)
        killer.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=400)
        over.set()
        killer.join(timeout=90)
    check("every client came back", not any(thread.is_alive() for thread in threads))
    same_as = [by_choice(stream.seen) == by_choice(whole) for stream, whole, _ in results]
    wrong = [difference(s.seen, w) for (s, w, _), ok in zip(results, same_as) if not ok and s.is_whole()]
    failed = [(s.path, len(s.seen), errors[:2], errors[-1]) for (s, _, errors), ok in zip(results, same_as) if not ok and not s.is_whole()]
    check(f"{requests} requests of {clients} clients, kills {killed}: no token wrong, missing or twice", not wrong, wrong[:2] if wrong else "")
    check("and all came to their end", len(results) == requests and not failed, failed[:3] if failed else f"{time.monotonic() - began:.0f} s")
    until("all nodes are back", 30, fleet.ready)
    until("no block is left in use", 20, fleet.settled)
    memory.check()
