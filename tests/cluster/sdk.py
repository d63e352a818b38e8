"""The Rust client's example against real nodes: it is told of one of them, learns of the others, and
prints the same text whatever happens to the one that it asks.
"""

import json
import os
import re
import signal
import subprocess
import threading

from nodes import Node, check, say, until, wait
from streams import Slow, plain, replicas, revive

PROMPT = "Tell me a short story about Mia."
GREEDY = ["--set", "temperature=0", "--set", "max_tokens=160"]
SEEDED = ["--set", "temperature=0.9", "--set", "max_tokens=160", "--set", "seed=11"]


class Chat:
    """One run of the example; reads its text as it comes."""

    def __init__(self, program: str, node: Node, *options: str):
        command = [program, "--endpoint", node.url, *options, PROMPT]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.text, self.said = b"", b""
        # A run that hangs is ended, and has then no status 0.
        self.timer = threading.Timer(60, self.process.kill)
        self.timer.start()

    def read(self, on_bytes=lambda count: None) -> "Chat":
        """To the end; `on_bytes` hears after each piece how many bytes have come."""
        while piece := os.read(self.process.stdout.fileno(), 65536):
            self.text += piece
            on_bytes(len(self.text))
        _, self.said = self.process.communicate()
        self.timer.cancel()
        return self

    def went_on(self) -> int:
        return len(re.findall(rb"^went on elsewhere", self.said, re.M))


def survives(program: str, nodes: list[Node]) -> None:
    """The node that the client asked is struck in the middle of its answer; with a model itself by turns.
    `nodes`: two with the model, two without."""
    a, b, entrance, other = nodes
    both = lambda: replicas(entrance) == 2 and replicas(other) == 2
    until("both replicas are known", 20, both)
    kills = [(share, signal.SIGKILL) for share in (0.02, 0.25, 0.5, 0.75)]
    # A stopped node is noticed after some six seconds: once is enough.
    for what, options, strikes in [("greedy", GREEDY, [*kills, (0.4, signal.SIGSTOP)]), ("seeded", SEEDED, kills)]:
        whole = Chat(program, entrance, *options).read()
        check(f"{what}: an undisturbed answer", whole.process.returncode == 0 and len(whole.text) > 100,
              f"{len(whole.text)} bytes, {whole.said.decode().strip()}")
        wrong, moved = [], 0
        for turn, (share, number) in enumerate(strikes):
            asked = (entrance, a)[turn % 2]
            chat = struck(program, asked, [a, b], options, int(len(whole.text) * share), number)
            moved += chat.went_on() > 0
            if chat.process.returncode != 0 or chat.text != whole.text:
                wrong.append((asked.name, share, chat.process.returncode, chat.text[-60:], chat.said[-300:]))
            revive(asked, number)
            wait(30, both)
        check(f"{what}: the node asked is struck {len(strikes)} times, and the text is the same", not wrong, wrong or "")
        check("and the client went on elsewhere", moved >= len(strikes) - 1, f"{moved} of {len(strikes)}, or all was out already")


def struck(program: str, asked: Node, slow_nodes: list[Node], options: list[str], at: int, number: int) -> Chat:
    with Slow(slow_nodes) as slow:
        done = []

        def on_bytes(count: int) -> None:
            if count > at and not done:
                done.append(count)
                slow.strike(asked, number)

        chat = Chat(program, asked, *options)
        return chat.read(on_bytes)


def whole(program: str, node: Node) -> None:
    """An answer in one piece is, field by field, the one that the node gives without streaming."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {
        "type": "object", "properties": {"word": {"type": "string", "maxLength": 8}}, "required": ["word"]}}}
    for what, fields in {
        "two choices with log-probabilities": {"n": 2, "logprobs": True, "top_logprobs": 2, "temperature": 0.9},
        "a call of a tool": {"tools": [tool], "tool_choice": "required", "temperature": 0.5},
    }.items():
        fields |= {"seed": 5, "max_tokens": 60}
        options = [option for field, value in fields.items() for option in ("--set", f"{field}={json.dumps(value)}")]
        ours = Chat(program, node, "--whole", *options).read()
        connection = node.connect(60)
        body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]} | fields
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        theirs = connection.getresponse().read().decode()
        connection.close()
        same = ours.process.returncode == 0 and plain(ours.text.decode()) == plain(theirs)
        check(f"{what}: in one piece, the client gives what the node gives", same, "" if same else f"{ours.text} {ours.said} {theirs}")


def lets_go(program: str, nodes: list[Node], asked: Node) -> None:
    """A stream that is dropped while its process lives on leaves nothing behind. `nodes` have the model, the
    one that is asked has not: the stream only passes through it."""
    idle = lambda: all(node.running() == 0 for node in nodes)
    until("nothing runs", 10, idle)
    before = cancelled(asked)
    with Slow(nodes):
        chat = Chat(program, asked, "--set", "max_tokens=900", "--set", "temperature=1", "--take", "3")
        line = chat.process.stderr.readline()
        check("a stream is let go after three events", b"let go" in line, line)
    until("its request is cancelled", 10, lambda: cancelled(asked) == before + 1)
    until("no node computes for it any more", 10, idle)
    used = [re.findall(r'^grapevine_kv_blocks\{[^}]*state="used"\} (\d+)', node.get("/metrics"), re.M) for node in nodes]
    check("and none holds blocks, while the client lives", used == [["0"]] * len(nodes) and chat.process.poll() is None, used)
    chat.process.stdin.close()
    status = chat.process.wait(timeout=20)
    chat.timer.cancel()
    check("which ends when it is told to", status == 0, status)


def cancelled(node: Node) -> int:
    """Chats whose client went away before their end."""
    found = re.findall(r'^grapevine_http_requests_total\{[^}]*"chat"[^}]*code="cancelled"\} (\d+)', node.get("/metrics"), re.M)
    return sum(map(int, found))
