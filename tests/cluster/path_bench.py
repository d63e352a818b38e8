#!/usr/bin/env python3
"""What a long, wide path carries: `tests/cluster/path_bench.py VINE MODEL.gguf QUIC_GOODPUT [RTT_MS] [MB_PER_S] [ROUNDS] [TOKENS]`.

Two hosts in network namespaces, between which this process delays and throttles packets (`bad_network.py`; root). First raw
streams of quinn, as many as said, on one connection and on two. Then a node that has prompts cached, and one that fetches
them, one prompt after the other on one connection: how many streams a fetch has grows with what the path was seen to carry.
Measures, asserts nothing but that blocks came.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from bad_network import Network, missing
from handoffs import WORDS, counter
from nodes import Node, check, failures, say, tails, until
from random import Random


def raw(goodput: str, network: Network, mib: int, streams: int, connections: int) -> list[float]:
    """MB/s of five runs on the same connections."""
    load = [str(mib), str(streams), str(connections)]
    inside = lambda host: ["ip", "netns", "exec", network.netns[host], goodput]
    sender = subprocess.Popen([*inside("a"), "--send", *load, f"{network.address['a']}:0"], stdout=subprocess.PIPE, text=True)
    try:
        address = sender.stdout.readline().split()
        out = subprocess.run([*inside("b"), "--receive", *load, *address], capture_output=True, text=True, timeout=300)
        return [float(line.split()[0]) for line in out.stdout.splitlines()]
    finally:
        sender.kill()
        sender.wait()


def complete(node: Node, model: str, prompt: str) -> int:
    """Prompt tokens of it that were not computed."""
    connection = node.connect(600)
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def main() -> int:
    vine, model, goodput, rtt_ms, mb_per_s, rounds, tokens = (sys.argv[1:] + [None] * 7)[:7]
    rtt_ms, mb_per_s, rounds, tokens = float(rtt_ms or 200), float(mb_per_s or 20), int(rounds or 6), int(tokens or 1000)
    if missing():
        say(f"skipped: {missing()}")
        return 0
    name = os.path.splitext(os.path.basename(model))[0]
    root, network = tempfile.mkdtemp(prefix="vine-path-"), Network(["a", "b"], 1)
    nodes = []
    try:
        network.delay_s, network.bytes_per_s = rtt_ms / 2000, mb_per_s * 1e6
        product = rtt_ms / 1e3 * mb_per_s
        say(f"round trip {rtt_ms:.0f} ms, {mb_per_s:.0f} MB/s: {product:.1f} MB on the way")
        for streams, connections in RAW if goodput != "-" else []:
            runs = raw(goodput, network, round(product * 6), streams, connections)
            say(f"raw, {streams} streams on each of {connections} connections: MB/s of runs after each other {runs}")
        options = ["--kv-memory", "1GiB", "--disagg", "never"]
        node = lambda n, role: Node(os.path.abspath(vine), root, n, model=model, host=network.address[n], netns=network.netns[n],
                                    options=[*options, "--role", role])
        # Who is there for prefills is asked for nothing but blocks, once another is there.
        a, b = nodes = [node("a", "prefill"), node("b", "both")]
        a.start()
        drawn = Random(1)
        prompts = [f"{n} " + " ".join(drawn.choice(WORDS) for _ in range(tokens * 4 // 7)) for n in range(rounds)]
        for prompt in prompts:
            complete(a, name, prompt)
        b.start(a.invite())
        ready = lambda n: sum(any(m["state"] == "ready" for m in peer["models"] or []) for peer in n.peers()) == 2
        until("the replicas are known", 120, lambda: ready(a) and ready(b))
        names = lambda n: counter(n, "grapevine_kv_directory_names")
        until("the directory knows the blocks", 30, lambda: max(names(a), names(b)) > 0)
        for n, prompt in enumerate(prompts):
            read = lambda: [counter(b, "grapevine_kv_bytes_total{direction=\"in\"}"), counter(b, "grapevine_kv_hand_off_seconds_total")]
            before = read()
            cached = complete(b, name, prompt)
            size, seconds = (after - b4 for after, b4 in zip(read(), before))
            check(f"prompt {n} comes", cached > 0 and seconds > 0,
                  f"{size / 1e6:.1f} MB in {seconds:.2f} s, {size / 1e6 / max(seconds, 1e-9):.1f} MB/s" if seconds else "")
        say(f"{network.passed} packets passed, {network.overflowed} overflowed")
        if failures:
            tails(nodes)
    finally:
        for n in nodes:
            n.kill()
        network.close()
        shutil.rmtree(root)
    return 1 if failures else 0


# Streams on each connection, connections.
RAW = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (4, 2)]

if __name__ == "__main__":
    sys.exit(main())
