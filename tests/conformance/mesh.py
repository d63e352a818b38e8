"""Several nodes on loopback are one service: `python mesh.py VINE`.

Real processes, joined by tokens: a node without a model answers for the others, clients of all nodes
see the same, and nodes that are killed or stopped under load cost nobody more than a pause.
Every wait is bounded; what it starts it ends.
"""

import os
import signal
import sys
import tempfile
import threading
import time

from openai import APIError, OpenAI

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cluster"))

from nodes import Node, check, failures, say, tails, until, wait

VINE = os.path.abspath(sys.argv[1])
QUESTION = [{"role": "user", "content": "What is Grapevine?"}]
# Long enough that a node which serves some of them is in the middle of one at any time.
LONG_TOKENS = 900


def client(node: Node) -> OpenAI:
    return OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(node: Node, **options) -> str:
    answer = client(node).chat.completions.create(model="demo", messages=QUESTION, temperature=0, **options)
    return answer.choices[0].message.content


def ask_streaming(node: Node) -> str:
    stream = client(node).chat.completions.create(model="demo", messages=QUESTION, temperature=0, stream=True)
    return "".join(e.choices[0].delta.content or "" for e in stream if e.choices)


class Asked:
    """One request of a client and what it got."""

    def __init__(self):
        self.began, self.ended = time.monotonic(), None
        self.text, self.error = "", None


class Load:
    """Clients in closed loops, each with long streams; what came of each request."""

    def __init__(self, node: Node, clients: int):
        self.node, self.stop = node, threading.Event()
        self.expected = self.stream(Asked()).text
        self.asked: list[list[Asked]] = [[] for _ in range(clients)]
        self.threads = [threading.Thread(target=self.run, args=(asked,), daemon=True) for asked in self.asked]
        for thread in self.threads:
            thread.start()

    def stream(self, asked: Asked) -> Asked:
        try:
            stream = client(self.node).completions.create(
                model="demo", prompt="Grapevine", temperature=0, stream=True, max_tokens=LONG_TOKENS,
                extra_body={"ignore_eos": True})
            for event in stream:
                asked.text += "".join(choice.text for choice in event.choices)
        except APIError as error:
            asked.error = str(error)
        asked.ended = time.monotonic()
        return asked

    def run(self, asked: list[Asked]) -> None:
        while not self.stop.is_set():
            asked.append(Asked())
            self.stream(asked[-1])

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(timeout=120)
        check("every client came back", not any(t.is_alive() for t in self.threads))


def joining(root: str, nodes: list[Node]) -> None:
    a, b, c = nodes
    a.start()
    token = a.invite()
    begun = time.monotonic()
    b.start(token)
    c.start(a.invite())
    until("all see three members", 30, lambda: all(n.sees(3) for n in nodes))
    say(f"{time.monotonic() - begun:.1f} s after the first invitation")
    said = Node(VINE, root, "used").refused(token)
    check("a used token is refused", "has been used" in said, said[:160])


def answering(nodes: list[Node]) -> None:
    a, b, c = nodes
    until("the model is known everywhere", 30, lambda: [m.id for m in client(c).models.list().data] == ["demo"])
    expected = ask(a)
    check("a node without the model answers the same", ask(c) == expected)
    check("and streams the same", ask_streaming(c) == expected)
    vector = client(c).embeddings.create(model="demo", input="grape").data[0].embedding
    check("and embeds", len(vector) > 0 and vector == client(a).embeddings.create(model="demo", input="grape").data[0].embedding)
    try:
        client(c).chat.completions.create(model="nothing", messages=QUESTION)
        check("an unknown model is 404", False)
    except APIError as error:
        check("an unknown model is 404", getattr(error, "status_code", 0) == 404, error.code)
    try:
        client(c).chat.completions.create(model="demo", messages=QUESTION, temperature=9)
        check("a bad value is refused through the mesh", False)
    except APIError as error:
        check("a bad value is refused through the mesh", getattr(error, "status_code", 0) == 400, error.code)
    stream = client(c).chat.completions.create(model="demo", messages=QUESTION, stream=True, max_tokens=500)
    next(iter(stream))
    stream.close()
    idle = lambda: all(m["running"] + m["waiting"] == 0 for p in a.peers() for m in p["models"] or [])
    until("a client that leaves frees the replica behind the mesh", 10, idle)


def struck_under_load(nodes: list[Node]) -> None:
    a, b, c = nodes
    name = b.id()
    for number, what in [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "SIGSTOP")]:
        load = Load(c, 8)
        time.sleep(1)
        # As soon as it is in the middle of streams, it is struck.
        running = 0
        for _ in range(200):
            if (running := b.running()) >= 2:
                break
            time.sleep(0.02)
        b.send(number)
        struck = time.monotonic()
        check(f"{what}: it had streams when it was struck", running >= 2, running)
        wait(15, lambda: c.view().get(name) != "alive")
        noticed = time.monotonic()
        check(f"{what}: the entrance notices", c.view().get(name) != "alive", f"{noticed - struck:.2f} s")
        time.sleep(5)
        load.end()
        judge(load, what, struck)
        if number == signal.SIGKILL:
            until("the others know of its death", 20, lambda: a.sees(2) and c.sees(2))
            b.kill()
            b.start()
        else:
            b.send(signal.SIGCONT)
        until("it comes back without a token", 60, lambda: all(n.sees(3) for n in (a, b, c)))


def judge(load: Load, what: str, struck: float) -> None:
    """What the clients may see of a struck node."""
    for number, asked in enumerate(load.asked):
        broken = [x for x in asked if x.error]
        say(f"client {number}: {len(asked) - len(broken)} answers" + "".join(
            f", one broken {x.ended - struck:.2f} s after the strike, {len(x.text)} bytes long" for x in broken))
    asked = [x for own in load.asked for x in own]
    broken = [x for x in asked if x.error]
    after = [x for x in asked if not x.error and x.began > struck]
    check(f"{what}: answers go on", len(after) >= 8, f"{len(after)} that began after the strike")
    check(f"{what}: every whole answer is right", all(x.error or x.text == load.expected for x in asked))
    check(f"{what}: no stream broke", not broken, sorted({x.error for x in broken}))
    slowest = max(x.ended - x.began for x in asked)
    check(f"{what}: nothing hangs", slowest < 15, f"slowest request {slowest:.1f} s")


def leaving(nodes: list[Node]) -> None:
    a, b, c = nodes
    check("SIGTERM ends a member with status 0", b.terminate() == 0)
    left = lambda: any(p["state"] == "left" for p in a.peers())
    until("the others saw it leave, not die", 10, left)
    check("the rest still answers", bool(ask(c)))


def main() -> int:
    with tempfile.TemporaryDirectory() as root:
        nodes = [Node(VINE, root, name, model=name != "c") for name in "abc"]
        try:
            joining(root, nodes)
            answering(nodes)
            struck_under_load(nodes)
            leaving(nodes)
        finally:
            for node in nodes:
                node.kill()
            if failures:
                tails(nodes)
    print(f"mesh: {len(failures)} failed")
    return 1 if failures else 0


sys.exit(main())
