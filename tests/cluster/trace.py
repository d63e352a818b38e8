#!/usr/bin/env python3
"""Chats of several tenants, played alike against each way to choose who answers: `tests/cluster/trace.py VINE [SEED...]`.

Four nodes have the model, and each is asked. Their steps are slowed (`--step-pause-ms`, and few tokens in each), so that two cores carry
them and the figures are about where requests go. The policies take turns within each seed, each on nodes that have cached
nothing. A node alone has answered the same turns before: each answer must be its answer.
"""

import http.client
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from handoffs import WORDS, counter
from nodes import Node, check, failures, say, tails, until

POLICIES = ["round-robin", "least-loaded", "prefix-only", "cost"]
NODES = 4
TENANTS = 8
STEP = ["--step-tokens", "32", "--step-pause-ms", "25"]
CHATS_PER_S = 1.6
# Instructions of a tenant, what a user says, and tokens of an answer: from, to.
INSTRUCTION_WORDS, TURN_WORDS, ANSWER_TOKENS, TURNS_MAX, THINK_S = (170, 240), (10, 25), (16, 40), 5, (0.3, 1.5)


class Chat:
    """What its user says and when; and the answers, once the node alone has given them."""

    def __init__(self, number: int, tenant: int, begins: float, drawn: random.Random, instructions: str):
        self.tenant, self.begins = tenant, begins
        self.said = [{"role": "system", "content": instructions}]
        words = lambda bounds: " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(*bounds)))
        self.turns = [{"text": f"{number}.{turn}: {words(TURN_WORDS)}", "tokens": drawn.randint(*ANSWER_TOKENS),
                       "think": drawn.uniform(*THINK_S), "ingress": drawn.randrange(NODES), "answer": None}
                      for turn in range(drawn.randint(1, TURNS_MAX))]

    def messages(self, turn: int) -> list[dict]:
        past = [({"role": "user", "content": t["text"]}, {"role": "assistant", "content": t["answer"]}) for t in self.turns[:turn]]
        return self.said + [m for pair in past for m in pair] + [{"role": "user", "content": self.turns[turn]["text"]}]


def chats(seed: int, seconds: float) -> list[Chat]:
    drawn = random.Random(seed)
    instructions = [f"Tenant {seed}.{k}: " + " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(*INSTRUCTION_WORDS)))
                    for k in range(TENANTS)]
    # Some tenants have much to say, others little.
    weights = [1 / (1 + k) for k in range(TENANTS)]
    made, now = [], 0.0
    while (now := now + drawn.expovariate(CHATS_PER_S)) < seconds:
        tenant = drawn.choices(range(TENANTS), weights)[0]
        made.append(Chat(len(made), tenant, now, drawn, instructions[tenant]))
    return made


def key(tenant: int) -> str:
    return f"tenant-{tenant}-0123456789abcdef0123456789abcdef"


def keys_file(root: str) -> str:
    path = os.path.join(root, "keys")
    with open(path, "w") as file:
        file.writelines(f"t{k}:{key(k)}:t{k}\n" for k in range(TENANTS))
    return path


def ask(node: Node, chat: Chat, turn: int) -> tuple[float, str, int, int]:
    """Seconds until the first words; the answer; tokens of the prompt, and those of them that were not computed for it."""
    body = {"model": "demo", "messages": chat.messages(turn), "max_tokens": chat.turns[turn]["tokens"], "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}
    headers = {"content-type": "application/json", "authorization": f"Bearer {key(chat.tenant)}"}
    connection = http.client.HTTPConnection(*node.api, timeout=60)
    began, first, text, usage = time.monotonic(), None, "", None
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status}: {response.read()[:200]}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"])
            said = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            first = first or (time.monotonic() - began if said else None)
            text, usage = text + said, event.get("usage") or usage
    finally:
        connection.close()
    return first or time.monotonic() - began, text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def answer_alone(alone: Node, made: list[Chat]) -> None:
    for chat in made:
        for turn in range(len(chat.turns)):
            chat.turns[turn]["answer"] = ask(alone, chat, turn)[1]


class Played:
    """What came of a trace."""

    def __init__(self):
        self.ttft, self.prompt, self.cached, self.wrong, self.computed, self.moved = [], 0, 0, [], [0.0] * NODES, 0.0
        self.lock = threading.Lock()

    def play(self, nodes: list[Node], made: list[Chat]) -> None:
        before = [read(node) for node in nodes]
        begin = time.monotonic() + 0.2
        threads = [threading.Thread(target=self.chat, args=(nodes, chat, begin), daemon=True) for chat in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        for k, node in enumerate(nodes):
            tokens, moved = read(node)
            self.computed[k] += tokens - before[k][0]
            self.moved += moved - before[k][1]

    def chat(self, nodes: list[Node], chat: Chat, begin: float) -> None:
        time.sleep(max(0.0, begin + chat.begins - time.monotonic()))
        for turn, what in enumerate(chat.turns):
            try:
                ttft, text, prompt, cached = ask(nodes[what["ingress"]], chat, turn)
            except (OSError, ValueError, http.client.HTTPException) as error:
                with self.lock:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                return
            with self.lock:
                self.ttft.append(ttft)
                self.prompt, self.cached = self.prompt + prompt, self.cached + cached
                if text != what["answer"]:
                    self.wrong.append(f"{text!r} and not {what['answer']!r}")
            time.sleep(what["think"])

    def at(self, share: float) -> float:
        ordered = sorted(self.ttft)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3

    def spread(self) -> float:
        return max(self.computed) / (sum(self.computed) / NODES)


def read(node: Node) -> tuple[float, float]:
    """Tokens that it has computed, and bytes of blocks that came to it."""
    lines = [line for line in node.get("/metrics").splitlines() if line.startswith("grapevine_step_tokens_total")]
    return sum(float(line.split()[-1]) for line in lines), counter(node, 'grapevine_kv_bytes_total{direction="in"}')


def fleet(vine: str, root: str, policy: str, started: list[Node]) -> list[Node]:
    """Four nodes that have cached nothing."""
    options = ["--api-keys", keys_file(root), "--route-by", policy, "--kv-memory", "128MiB", *STEP]
    nodes = [Node(vine, root, f"{policy}{len(started)}-{k}", model=True, options=options) for k in range(NODES)]
    for node in nodes:
        node.headers = {"authorization": f"Bearer {key(0)}"}
    started += nodes
    token = nodes[0].start().invite("--uses", str(NODES - 1), "--roles", "compute,ingress")
    for node in nodes[1:]:
        node.begin(token)
    ready = lambda node: sum(any(m["state"] == "ready" for m in peer["models"] or []) for peer in node.peers()) == NODES
    until(f"{policy}: {NODES} nodes know each other's replicas", 60, lambda: all(node.is_up() and ready(node) for node in nodes))
    return nodes


def compare(vine: str, root: str, seeds: list[int], seconds: float, started: list[Node]) -> dict[str, Played]:
    alone = Node(vine, root, "alone", model=True, options=["--api-keys", keys_file(root)])
    started.append(alone)
    alone.start()
    played = {policy: Played() for policy in POLICIES}
    for seed in seeds:
        made = chats(seed, seconds)
        answer_alone(alone, made)
        # Another one begins each time.
        for policy in POLICIES[seed % len(POLICIES):] + POLICIES[:seed % len(POLICIES)]:
            nodes = fleet(vine, root, policy, started)
            played[policy].play(nodes, made)
            for node in nodes:
                node.kill()
    for policy, of in played.items():
        check(f"{policy}: {len(of.ttft)} answers are those of a node alone", not of.wrong, of.wrong[:2] if of.wrong else "")
    return played


def table(played: dict[str, Played]) -> None:
    print("| policy | turns | TTFT p50 | p95 | cached | blocks moved | busiest / mean |\n|---|---|---|---|---|---|---|")
    for policy, of in played.items():
        print(f"| {policy} | {len(of.ttft)} | {of.at(0.5):.0f} ms | {of.at(0.95):.0f} ms | {of.cached / max(1, of.prompt):.1%} | "
              f"{of.moved / 1e6:.0f} MB | {of.spread():.2f} |", flush=True)


def main() -> int:
    root, started = tempfile.mkdtemp(prefix="vine-trace-"), []
    try:
        seeds = [int(seed) for seed in sys.argv[2:]] or [0, 1, 2]
        table(compare(os.path.abspath(sys.argv[1]), root, seeds, 30, started))
    finally:
        for node in started:
            node.kill()
        if failures:
            tails(started)
        shutil.rmtree(root)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
