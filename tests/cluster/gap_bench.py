#!/usr/bin/env python3
"""How long a stream pauses when its replica dies: `tests/cluster/gap_bench.py VINE [ROUNDS] [MODEL]`.

Two replicas and an entrance without a model, on loopback. A greedy answer of 64 tokens, 20 ms apart, whose
replica gets SIGKILL (the connection breaks) or SIGSTOP (it goes silent) after a random event; the other one goes
on. Prints quantiles of the longest pause between two events less the usual one, the replay of what was said
included. Measures, asserts nothing but that the events are those of an undisturbed answer.
"""

import os
import random
import shutil
import signal
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from nodes import Node, check, failures, say, until, wait
from streams import BROKEN, GREEDY, Events, continued, replicas, revive, running

STEP_MS = 20


def struck(nodes: list[Node], request: tuple[str, dict], at: int, number: int) -> Events:
    a, b, entrance = nodes
    victims, moved = [], continued(entrance)

    def on_event(count: int) -> None:
        if count == at:
            victims.extend([node for node in (a, b) if running(node)][:1])
            for victim in victims:
                victim.send(number)

    stream = Events(request, on_event)
    try:
        stream.read(entrance)
    except BROKEN as error:
        stream.seen.append(f"{type(error).__name__}: {error}")
    stream.moved = continued(entrance) > moved
    for victim in victims:
        revive(victim, number)
    return stream


def quantile(of: list[float], share: float) -> float:
    return sorted(of)[min(len(of) - 1, int(share * len(of)))]


def main() -> int:
    vine, rounds, model = (sys.argv[1:] + [None] * 3)[:3]
    rounds = int(rounds or 100)
    path, body = GREEDY
    request = (path, body | ({"model": os.path.splitext(os.path.basename(model))[0]} if model else {}))
    root = tempfile.mkdtemp(prefix="vine-bench-")
    replica = lambda name: Node(os.path.abspath(vine), root, name, model=model or True, options=["--step-pause-ms", str(STEP_MS)])
    a, b, entrance = nodes = [replica("a"), replica("b"), Node(os.path.abspath(vine), root, "entrance")]
    try:
        a.start()
        for node in (b, entrance):
            node.start(a.invite())
        ready = lambda: replicas(entrance) == 2
        until("both replicas are known", 60, ready)
        whole = Events(request).read(entrance)
        usual = statistics.median(later - sooner for sooner, later in zip(whole.times, whole.times[1:]))
        drawn = random.Random(1)
        for name, number in [("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)]:
            gaps, wrong = [], 0
            for _ in range(rounds):
                stream = struck(nodes, request, drawn.randrange(4, 56), number)
                wrong += stream.seen != whole.seen
                if stream.moved:
                    gaps.append((stream.pause() - usual) * 1e3)
                wait(30, ready)
            check(f"{name}: every answer is the undisturbed one", not wrong, f"{rounds - wrong} of {rounds}")
            say(f"{name}: {len(gaps)} streams went on elsewhere; gap p50 {quantile(gaps, 0.5):.0f} ms, p90 {quantile(gaps, 0.9):.0f}, "
                f"p99 {quantile(gaps, 0.99):.0f}, longest {max(gaps):.0f}; usual {usual * 1e3:.0f}")
    finally:
        for node in nodes:
            node.kill()
        shutil.rmtree(root)
    return 1 if failures else 0


sys.exit(main())
