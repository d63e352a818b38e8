"""Prefixes that have left the pool: in host memory, on disk, over restarts and kills, on files that somebody has
damaged, on a disk that is full, and for other nodes. What a client gets is what a node alone gives.

The pool has room for some five of the prompts. A node that is in no mesh and forgets nothing says what is right.
"""

import collections
import fcntl
import glob
import http.client
import json
import os
import random
import re
import threading
import time

from nodes import Node, check, say, until, wait
from handoffs import WORDS
from streams import BROKEN

# 64 blocks of 16 KiB.
POOL = ["--kv-memory", "1MiB", "--context", "512"]
BLOCK_TOKENS, RECORD_BYTES = 16, 16 * 1024 + 512
TOKENS = 12
PROMPTS = 24
# The tiers bring up what they have no later than it could be computed. The built-in model computes a block in half a
# millisecond, so that on a busy machine some prompts are rather computed.
SHARE_MIN = 0.5
# As in engine/src/tiers/store.rs: the disk tier leaves so much of a disk to others.
FREE_KEPT = 256 << 20

Said = collections.namedtuple("Said", "text cached prompt_tokens")


def ask(node: Node, number: int) -> Said:
    """A greedy answer to a prompt of some 200 tokens; an error of any kind is the caller's."""
    drawn = random.Random(number)
    prompt = f"{number}: " + " ".join(drawn.choice(WORDS) for _ in range(120))
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    connection = node.connect(30)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {answer}")
    usage = answer["usage"]
    return Said(answer["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"])


def tier(node: Node, what: str, tier_name: str) -> float:
    """A number of one tier, as its node's metrics say it."""
    found = re.findall(rf'^grapevine_kv_tier_{what}\{{[^}}]*tier="{tier_name}"[^}}]*\}} (\S+)', node.get("/metrics"), re.M)
    if len(found) != 1:
        raise ValueError(f"no grapevine_kv_tier_{what} of {tier_name}")
    return float(found[0])


def is_paused(node: Node) -> bool:
    return re.search(r"^grapevine_kv_tier_paused\{[^}]*\} 1$", node.get("/metrics"), re.M) is not None


def blocks_file(node: Node) -> str:
    found = glob.glob(os.path.join(node.data, "kv", "demo", "*", "blocks.kv"))
    if len(found) != 1:
        raise ValueError(f"{node.name} has {found} instead of one file")
    return found[0]


class Reference:
    """What is right, and what has been asked so far."""

    def __init__(self, alone: Node):
        self.alone, self.known, self.lock = alone, {}, threading.Lock()

    def of(self, number: int) -> Said:
        with self.lock:
            if number not in self.known:
                self.known[number] = ask(self.alone, number)
            return self.known[number]

    def blocks(self, numbers) -> int:
        """Full blocks of these prompts and their answers; the last token of an answer is in none."""
        return sum((self.of(n).prompt_tokens + TOKENS - 1) // BLOCK_TOKENS for n in numbers)

    def same(self, what: str, node: Node, numbers, share_min: float = 0.0) -> None:
        """The node's answers are right, and of at least this share of the prompts all full blocks were cached."""
        wrong, whole, part = [], 0, 0
        for number in numbers:
            right, said = self.of(number), ask(node, number)
            if said.text != right.text:
                wrong.append((number, said.text, right.text))
            full = (right.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            whole += said.cached == full
            part += 0 < said.cached < full
        check(f"{what}: {len(numbers)} answers are those of a node alone", not wrong, wrong[:2] if wrong else "")
        if share_min:
            hits = [f"{name} {tier(node, 'hits_total', name):.0f}" for name in ("host", "disk")]
            check("and their prompts were not computed again", whole >= share_min * len(numbers),
                  f"{whole} of {len(numbers)} were cached, {part} in part; blocks brought up: {', '.join(hits)}")


def logs(node: Node, text: str, what: str) -> None:
    """The log of the node's present life has a warning with these words."""
    lines = lambda: [line for line in node.output().splitlines() if text in line and "WARN" in line]
    took = wait(10, lambda: bool(lines()))
    line = lines()[0] if took is not None else ""
    check(what, took is not None, line[line.find(text):][:180] if line else f"no warning with {text!r}")


def spilled_to_host(reference: Reference, node: Node, prompts: int = PROMPTS) -> None:
    numbers = range(prompts)
    reference.same("to host memory", node, numbers)
    reference.same("from host memory", node, numbers, SHARE_MIN)
    check("the blocks came from host memory", tier(node, "hits_total", "host") >= 64, tier(node, "hits_total", "host"))
    check("and there is no disk", tier(node, "blocks", "disk") == 0)


def spilled_to_disk(reference: Reference, node: Node, prompts: int = PROMPTS) -> None:
    """Down, up, and after both kinds of an end."""
    numbers = range(prompts)
    reference.same("to disk", node, numbers)
    wanted = reference.blocks(numbers)
    until(f"an idle node copies all its {wanted} blocks to the disk", 10, lambda: tier(node, "blocks", "disk") == wanted)
    reference.same("from disk", node, numbers, SHARE_MIN)
    check("the blocks came from the disk", tier(node, "hits_total", "disk") >= 64, tier(node, "hits_total", "disk"))
    for what, end in [("stopped", node.terminate), ("killed", node.kill)]:
        end()
        node.start()
        until(f"{what} and started, it finds its blocks", 10, lambda: tier(node, "blocks", "disk") == wanted)
        reference.same("from a warm disk", node, numbers, SHARE_MIN)
        check("the blocks came from the disk", tier(node, "hits_total", "disk") >= 64, tier(node, "hits_total", "disk"))
        check("and none was damaged", tier(node, "corrupt_total", "disk") == 0)


def killed_while_it_writes(reference: Reference, node: Node, rounds: int) -> None:
    """kill -9 at random moments while two clients make it spill; some of what they ask was written before."""
    drawn, wrong, answers, damaged, found = random.Random(3), [], 0, 0, []
    seen = []
    for turn in range(rounds):
        first = 1000 + 100 * turn
        said: list[tuple[int, str]] = []

        def client(numbers: list[int]) -> None:
            for number in numbers:
                try:
                    said.append((number, ask(node, number).text))
                except BROKEN:
                    return

        old = drawn.sample(seen, min(len(seen), 12))
        clients = [threading.Thread(target=client, args=(old[k::2] + list(range(first + k, first + 100, 2)),), daemon=True)
                   for k in range(2)]
        for thread in clients:
            thread.start()
        time.sleep(drawn.uniform(0.05, 0.5))
        node.kill()
        for thread in clients:
            thread.join(timeout=60)
        wrong += [(number, text) for number, text in said if text != reference.of(number).text]
        answers += len(said)
        seen += [number for number, _ in said if number >= first]
        node.start()
        wait(10, lambda: tier(node, "blocks", "disk") > 0)
        found.append(tier(node, "blocks", "disk"))
        damaged += tier(node, "corrupt_total", "disk")
    check(f"killed {rounds} times while it writes, none of {answers} answers is wrong", answers > rounds and not wrong, wrong[:2] if wrong else "")
    say(f"{found[0]:.0f} blocks on disk after the first kill, {found[-1]:.0f} after the last; {damaged:.0f} torn records found at starts")
    reference.same("after the last kill", node, drawn.sample(seen, min(len(seen), PROMPTS)))


def flip_bits(path: str) -> int:
    """A bit in each record: in the header of one, in the payload of the next."""
    drawn = random.Random(5)
    with open(path, "r+b") as file:
        records = os.path.getsize(path) // RECORD_BYTES
        for record in range(records):
            at = record * RECORD_BYTES + (drawn.randrange(152) if record % 2 else drawn.randrange(512, RECORD_BYTES))
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << drawn.randrange(8)]))
    return records


def cut_short(path: str) -> int:
    # In the middle of a header.
    os.truncate(path, os.path.getsize(path) // RECORD_BYTES * 6 // 10 * RECORD_BYTES + 77)
    return 1


def garbage(path: str) -> int:
    size = os.path.getsize(path)
    with open(path, "wb") as file:
        file.write(random.Random(6).randbytes(size))
    return size // RECORD_BYTES


def emptied(path: str) -> int:
    os.truncate(path, 0)
    return 0


DAMAGES = [("a bit of each record is flipped", flip_bits), ("the file is cut short", cut_short),
           ("the file is garbage", garbage), ("the file is empty", emptied)]


def damaged(reference: Reference, node: Node, prompts: int = PROMPTS) -> None:
    """Somebody damages the file while the node is down, and while it runs."""
    numbers = range(prompts)
    filled = lambda: until("all is on disk", 10, lambda: tier(node, "blocks", "disk") >= reference.blocks(numbers))
    for what, damage in DAMAGES:
        reference.same("before", node, numbers)
        filled()
        node.kill()
        records = damage(blocks_file(node))
        node.start()
        reference.same(f"{what} while the node is down", node, numbers)
        if records:
            logs(node, "a cached block on disk is lost: ", "the log says what is lost and where")
            # Payloads are looked at when they are read, and what follows a lost block is not read.
            found = tier(node, "corrupt_total", "disk")
            check("and the metrics count it", 1 <= found <= records, f"{found:.0f} of {records}")
    for what, damage in DAMAGES:
        reference.same("written again", node, numbers)
        filled()
        before = tier(node, "corrupt_total", "disk")
        damage(blocks_file(node))
        # The buffer in front of the disk holds 64 of the blocks.
        reference.same(f"{what} under a running node", node, numbers)
        found = tier(node, "corrupt_total", "disk") - before
        check("and the metrics count what was found", found > 0, f"{found:.0f} records")
        filled()
    # Ten a minute, and the rest as a number.
    logs(node, "a cached block on disk is lost: ", "the log says what is lost and where")
    reference.same("written again", node, numbers, SHARE_MIN)


def not_its_own(reference: Reference, node: Node) -> None:
    """Another process has the file, or something else lies where it was."""
    numbers = range(8)
    path = blocks_file(node)
    node.kill()
    with open(path, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        node.start()
        logs(node, "blocks are not cached on disk: ", "another process has the file, and the log says so")
        reference.same("meanwhile", node, numbers)
        check("and the disk is not used", tier(node, "stored_total", "disk") == 0)
        node.kill()
    node.start()
    until("started again without it, the node has its blocks", 10, lambda: tier(node, "blocks", "disk") > 0)
    node.kill()
    kept = os.path.join(node.data, "kv.kept")
    os.rename(os.path.join(node.data, "kv"), kept)
    with open(os.path.join(node.data, "kv"), "w") as file:
        file.write("something else")
    node.start()
    logs(node, "blocks are not cached on disk: ", "something else lies there, and the log says so")
    reference.same("meanwhile", node, numbers)
    node.kill()
    os.remove(os.path.join(node.data, "kv"))
    os.rename(kept, os.path.join(node.data, "kv"))
    node.start()
    until("put right again, the node has its blocks", 10, lambda: tier(node, "blocks", "disk") > 0)
    reference.same("and", node, numbers)


def full(reference: Reference, node: Node, fill_file: str) -> None:
    """`fill_file` lies on the node's disk, which is a little larger than what the disk tier leaves to others."""
    first, second, third = range(200, 212), range(212, 236), range(236, 260)
    reference.same("there is room", node, first)
    until("and it is used", 10, lambda: tier(node, "blocks", "disk") >= reference.blocks(first))
    with open(fill_file, "wb") as file:
        disk = os.statvfs(fill_file)
        free = disk.f_bavail * disk.f_frsize
        os.posix_fallocate(file.fileno(), 0, max(1 << 20, free - FREE_KEPT + (1 << 20)))
    stored = tier(node, "stored_total", "disk")
    reference.same("the disk is full up to what is left to others", node, second)
    logs(node, "the disk of cached blocks cannot be written and is left alone for a while: ", "the log says so")
    check("and the metrics", is_paused(node) and tier(node, "stored_total", "disk") - stored <= 8)
    # What was written is read: not everything that was asked since fits into memory.
    hits = tier(node, "hits_total", "disk")
    reference.same("what lies on it is still read", node, first)
    check("from the disk", tier(node, "hits_total", "disk") > hits, tier(node, "hits_total", "disk") - hits)
    with open(fill_file, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            say(f"not a byte is left: {error}")
    reference.same("and to its last byte", node, third)
    check("the node runs", node.runs())
    os.remove(fill_file)

    def goes_on() -> bool:
        ask(node, random.randrange(10_000, 1_000_000))
        return not is_paused(node) and tier(node, "stored_total", "disk") > stored + 64

    # A pause lasts 5 s, and with each failure in a row twice as long.
    until("there is room again, and the disk is used again", 60, goes_on)
    reference.same("after all that", node, [*first, *second, *third])


def filled(reference: Reference, node: Node, numbers: range) -> None:
    """These prompts, and no others, on the disk of a node that has ended."""
    node.start()
    reference.same(node.name, node, numbers)
    until("all of it is on its disk", 10, lambda: tier(node, "blocks", "disk") == reference.blocks(numbers))
    node.kill()


def peers(reference: Reference, holder: Node, other: Node, numbers: range) -> None:
    """Prompts that lie on the holder's disk, and nowhere else, are answered by another node without computing them."""
    wanted = reference.blocks(numbers)
    ready = lambda: sum(peer["state"] == "alive" and any(m["state"] == "ready" for m in peer["models"] or []) for peer in other.peers())
    until("both replicas are known", 20, lambda: ready() == 2)
    told = lambda: min(counter_of(node, "grapevine_kv_directory_names") for node in (holder, other))
    until("both owners of the directory are told of all that the disk has", 20, lambda: told() >= wanted)
    said = {number: ask(other, number) for number in numbers}
    wrong = [(number, answer.text) for number, answer in said.items() if answer.text != reference.of(number).text]
    check(f"{len(numbers)} answers of the other node are those of a node alone", not wrong, wrong[:2] if wrong else "")
    cached, hits = sum(answer.cached > 0 for answer in said.values()), tier(holder, "hits_total", "disk")
    came = counter_of(other, "grapevine_kv_blocks_attached_total")
    check("and their prompts came from the holder's disk", min(cached / len(numbers), hits / wanted, came / wanted) >= SHARE_MIN,
          f"{cached} of {len(numbers)} were cached; of {wanted} blocks {hits:.0f} were brought up there, {came:.0f} came here")
    used = lambda node: counter_of(node, "grapevine_kv_blocks{", 'state="used"')
    until("no block is left in use", 10, lambda: used(holder) == used(other) == 0)


def counter_of(node: Node, name: str, label: str = "") -> float:
    lines = [line for line in node.get("/metrics").splitlines() if line.startswith(name) and label in line]
    if not lines:
        raise ValueError(f"no {name}")
    return sum(float(line.split()[-1]) for line in lines)
