"""Several nodes on loopback are one service: `python mesh.py VINE`.

Real processes, joined by tokens: a node without a model answers for the others, clients of all nodes
see the same, and nodes that are killed or stopped under load cost nobody more than a clear error.
Every wait is bounded; what it starts it ends.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

from openai import APIError, OpenAI

VINE = sys.argv[1]
QUESTION = [{"role": "user", "content": "What is Grapevine?"}]
failures = []


def check(what: str, ok: bool, detail: object = "") -> None:
    print(f"{'ok  ' if ok else 'FAIL'} {what}" + (f": {detail}" if detail != "" else ""), flush=True)
    if not ok:
        failures.append(what)


def until(what: str, seconds: float, holds) -> float:
    """Waits until something holds and gives the seconds that took."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        try:
            if holds():
                check(what, True)
                return time.monotonic() - start
        except (OSError, ValueError, subprocess.CalledProcessError):
            pass
        time.sleep(0.05)
    check(what, False, f"not within {seconds} s")
    return seconds


class Node:
    """One `vine up`, its data and its output."""

    def __init__(self, root: str, name: str, *, model: bool):
        self.name, self.data = name, os.path.join(root, name)
        self.log = os.path.join(root, f"{name}.log")
        self.model, self.process, self.url = model, None, None

    def start(self, token: str | None = None) -> "Node":
        command = [VINE, "up", "--api", "127.0.0.1:0", "--mesh", "127.0.0.1:0", "--data", self.data, "--threads", "1"]
        command += ["--model", "demo"] if self.model else []
        command += ["--join", token] if token else []
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(f"{self.name} starts", 60, self.find_url)
        return self

    def find_url(self) -> bool:
        with open(self.log) as log:
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read())
        self.url = found and found.group(0)
        return bool(found)

    def vine(self, *args: str) -> str:
        run = subprocess.run([VINE, *args, "--data", self.data], capture_output=True, text=True, timeout=60)
        if run.returncode:
            raise ValueError(run.stderr)
        return run.stdout

    def peers(self) -> list[dict]:
        return json.loads(self.vine("peers", "--json"))["peers"]

    def sees(self, alive: int) -> bool:
        return sum(p["state"] == "alive" for p in self.peers()) == alive

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        if self.process:
            self.process.wait(timeout=10)


def ask(node: Node, **options) -> str:
    answer = node.client().chat.completions.create(model="demo", messages=QUESTION, temperature=0, **options)
    return answer.choices[0].message.content


def ask_streaming(node: Node) -> str:
    stream = node.client().chat.completions.create(model="demo", messages=QUESTION, temperature=0, stream=True)
    return "".join(e.choices[0].delta.content or "" for e in stream if e.choices)


class Load:
    """Clients in closed loops; what came of each request."""

    def __init__(self, node: Node, clients: int):
        self.node, self.stop = node, threading.Event()
        self.answers, self.errors, self.slowest = 0, [], 0.0
        self.expected = ask(node, max_tokens=40)
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self) -> None:
        client = self.node.client()
        while not self.stop.is_set():
            begun = time.monotonic()
            text, error = "", None
            try:
                stream = client.chat.completions.create(
                    model="demo", messages=QUESTION, temperature=0, stream=True, max_tokens=40)
                for event in stream:
                    if event.choices:
                        text += event.choices[0].delta.content or ""
            except APIError as e:
                error = str(e)
            with self.lock:
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if error is None and text == self.expected:
                    self.answers += 1
                else:
                    self.errors.append(error or f"another answer: {text!r}")

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(timeout=120)
        check("every client came back", not any(t.is_alive() for t in self.threads))


def joining(root: str, nodes: list[Node]) -> None:
    a, b, c = nodes
    a.start()
    token = json.loads(a.vine("invite", "--json"))["token"]
    begun = time.monotonic()
    b.start(token)
    c.start(json.loads(a.vine("invite", "--json"))["token"])
    took = until("all see three members", 30, lambda: all(n.sees(3) for n in nodes))
    print(f"     {time.monotonic() - begun:.1f} s after the first invitation, {took:.1f} s of it waiting")
    used = Node(root, "used", model=False)
    with open(used.log, "w") as log:
        command = [VINE, "up", "--api", "127.0.0.1:0", "--mesh", "127.0.0.1:0", "--data", used.data, "--join", token]
        refused = subprocess.run(command, stdout=log, stderr=log, timeout=90).returncode
    with open(used.log) as log:
        check("a used token is refused", refused != 0, log.read().strip().splitlines()[-1][:160])


def answering(nodes: list[Node]) -> None:
    a, b, c = nodes
    until("the model is known everywhere", 30, lambda: [m.id for m in c.client().models.list().data] == ["demo"])
    expected = ask(a)
    check("a node without the model answers the same", ask(c) == expected)
    check("and streams the same", ask_streaming(c) == expected)
    vector = c.client().embeddings.create(model="demo", input="grape").data[0].embedding
    check("and embeds", len(vector) > 0 and vector == a.client().embeddings.create(model="demo", input="grape").data[0].embedding)
    try:
        c.client().chat.completions.create(model="nothing", messages=QUESTION)
        check("an unknown model is 404", False)
    except APIError as error:
        check("an unknown model is 404", getattr(error, "status_code", 0) == 404, error.code)
    try:
        c.client().chat.completions.create(model="demo", messages=QUESTION, temperature=9)
        check("a bad value is refused through the mesh", False)
    except APIError as error:
        check("a bad value is refused through the mesh", getattr(error, "status_code", 0) == 400, error.code)
    stream = c.client().chat.completions.create(model="demo", messages=QUESTION, stream=True, max_tokens=500)
    next(iter(stream))
    stream.close()
    idle = lambda: all(m["running"] + m["waiting"] == 0 for p in a.peers() for m in p["models"] or [])
    until("a client that leaves frees the replica behind the mesh", 10, idle)


def killed_under_load(nodes: list[Node]) -> None:
    a, b, c = nodes
    for number, name in [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "SIGSTOP")]:
        load = Load(c, 8)
        time.sleep(2)
        b.send(number)
        struck = time.monotonic()
        time.sleep(6)
        load.end()
        clear = [e for e in load.errors if "node" in e]
        check(f"{name} under load: answers go on", load.answers > 10, f"{load.answers} answers")
        check(f"{name} under load: at most the running streams break, each with a clear error",
              len(load.errors) <= 8 and len(clear) == len(load.errors), load.errors[:1] + [len(load.errors)])
        check(f"{name} under load: nothing hangs", load.slowest < 15, f"slowest request {load.slowest:.1f} s")
        if number == signal.SIGKILL:
            gone = until("the others know of its death", 20, lambda: a.sees(2) and c.sees(2))
            print(f"     {time.monotonic() - struck:.1f} s after it, {gone:.1f} s of it waiting")
            b.end()
            b.start()
        else:
            b.send(signal.SIGCONT)
        back = until("it comes back without a token", 60, lambda: all(n.sees(3) for n in nodes))
        print(f"     after {back:.1f} s")


def leaving(nodes: list[Node]) -> None:
    a, b, c = nodes
    b.send(signal.SIGTERM)
    check("SIGTERM ends a member with status 0", b.process.wait(timeout=30) == 0)
    left = lambda: any(p["state"] == "left" for p in a.peers())
    until("the others saw it leave, not die", 10, left)
    check("the rest still answers", bool(ask(c)))


def main() -> int:
    with tempfile.TemporaryDirectory() as root:
        nodes = [Node(root, "a", model=True), Node(root, "b", model=True), Node(root, "c", model=False)]
        try:
            joining(root, nodes)
            answering(nodes)
            killed_under_load(nodes)
            leaving(nodes)
        finally:
            for node in nodes:
                node.end()
            if failures:
                for node in nodes:
                    with open(node.log) as log:
                        print(f"--- {node.name}\n" + "".join(log.readlines()[-25:]))
    print(f"mesh: {len(failures)} failed")
    return 1 if failures else 0


sys.exit(main())
