"""Real nodes for the scripts that try them: processes, what they see and what they answer.

Every wait is bounded, and who starts a node ends it. Standard library only.
"""

import ctypes
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time

failures = []
began = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - began:7.1f} s      {text}", flush=True)


def check(what: str, ok: bool, detail: object = "") -> bool:
    """One line for each promise; a broken one is remembered."""
    mark = "ok  " if ok else "FAIL"
    print(f"{time.monotonic() - began:7.1f} s {mark} {what}" + (f": {detail}" if detail != "" else ""), flush=True)
    if not ok:
        failures.append(what)
    return ok


def wait(seconds: float, holds) -> float | None:
    """The seconds until something holds; None if it does not within `seconds`."""
    start = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - start
        except (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError):
            pass
        if time.monotonic() - start > seconds:
            return None
        time.sleep(0.05)


def until(what: str, seconds: float, holds) -> float:
    """Checks that something holds within `seconds`, and gives the seconds that took."""
    took = wait(seconds, holds)
    check(what, took is not None, f"{took:.1f} s" if took is not None else f"not within {seconds} s")
    return seconds if took is None else took


def free_port(host: str) -> int:
    """A UDP port that is free now, for a node that must come back at the same address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class Node:
    """One `vine up`: its data directory, its process, its log."""

    def __init__(self, vine: str, root: str, name: str, *, model: bool | str = False, host: str = "127.0.0.1",
                 port: int = 0, netns: str | None = None, data: str | None = None, env: dict | None = None,
                 options: list[str] | None = None):
        self.program, self.name, self.model = vine, name, model
        self.host, self.port, self.netns, self.env = host, port, netns, env or {}
        self.options = options or []
        # Sent with what is read of it, where that needs a key.
        self.headers: dict[str, str] = {}
        self.data = data or os.path.join(root, name)
        self.log, self.starts = os.path.join(root, f"{name}.log"), 0
        self.log_from = 0
        self.process: subprocess.Popen | None = None
        self.url = self.api = None

    def begin(self, token: str | None = None) -> "Node":
        """Starts the process and does not wait for it."""
        command = ["ip", "netns", "exec", self.netns] if self.netns else []
        command += [self.program, "up", "--api", "127.0.0.1:0", "--mesh", f"{self.host}:{self.port}"]
        command += ["--data", self.data, "--threads", "1"]
        command += ["--model", "demo" if self.model is True else self.model] if self.model else []
        command += self.options
        command += ["--join", token] if token else []
        self.url, self.api = None, None
        with open(self.log, "a") as log:
            self.log_from = log.tell()
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **self.env})
        return self

    def start(self, token: str | None = None) -> "Node":
        self.begin(token)
        if wait(120, lambda: self.is_up() or self.process.poll() is not None) is None or not self.url:
            check(f"{self.name} starts", False, self.last_line())
        return self

    def output(self) -> str:
        """What the last start has written."""
        with open(self.log) as log:
            log.seek(self.log_from)
            return log.read()

    def last_line(self) -> str:
        lines = [line for line in self.output().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "(it wrote nothing)"

    def is_up(self) -> bool:
        found = re.search(r"http://(127\.0\.0\.1):(\d+)", self.output())
        if found:
            self.url, self.api = found.group(0), (found.group(1), int(found.group(2)))
        return bool(found)

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def vine(self, *args: str) -> str:
        """A command of the command line, for this node; ValueError with what it says if it fails."""
        run = subprocess.run([self.program, *args, "--data", self.data], capture_output=True, text=True, timeout=60)
        if run.returncode:
            raise ValueError(run.stderr.strip())
        return run.stdout

    def invite(self, *args: str) -> str:
        return json.loads(self.vine("invite", "--json", *args))["token"]

    def status(self) -> dict:
        return json.loads(self.vine("status", "--json"))

    def id(self) -> str:
        return self.status()["node"]

    def peers(self) -> list[dict]:
        return json.loads(self.vine("peers", "--json"))["peers"]

    def view(self) -> dict[str, str]:
        """The state of each member, as this node sees it."""
        return {peer["node"]: peer["state"] for peer in self.peers()}

    def sees(self, alive: int) -> bool:
        return sum(state == "alive" for state in self.view().values()) == alive

    def running(self) -> int:
        """Sequences that run on this node, as its own metrics say."""
        sums = re.findall(r'^grapevine_sequences\{[^}]*state="running"\} (\d+)', self.get("/metrics"), re.M)
        return sum(map(int, sums))

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics"), re.M)
        return sum(map(float, values))

    def connect(self, timeout: float) -> http.client.HTTPConnection:
        """A connection to the API, made in the node's network namespace."""
        connection = http.client.HTTPConnection(*self.api, timeout=timeout)
        if self.netns:
            with in_netns(self.netns):
                connection.connect()
        return connection

    def get(self, path: str) -> str:
        connection = self.connect(10)
        try:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"{path}: {response.status}")
            return response.read().decode()
        finally:
            connection.close()

    def models(self) -> list[str]:
        return [model["id"] for model in json.loads(self.get("/v1/models"))["data"]]

    def ask(self, *, stream: bool = True, tokens: int = 40, timeout: float = 60) -> "Answer":
        """One request for `tokens` tokens, whatever they say."""
        answer = Answer()
        body = {"model": "demo", "prompt": "Grapevine", "temperature": 0, "max_tokens": tokens,
                "ignore_eos": True, "stream": stream}
        try:
            connection = self.connect(timeout)
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                answer.read(connection.getresponse(), stream)
            finally:
                connection.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer.error = answer.error or f"{type(error).__name__}: {error}"
        answer.ended = time.monotonic()
        return answer

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, also of a stopped process."""
        if self.runs():
            self.send(signal.SIGKILL)
        if self.process:
            self.process.wait(timeout=30)

    def terminate(self) -> int | None:
        """SIGTERM; the status it ends with, None if it does not end."""
        self.send(signal.SIGTERM)
        try:
            return self.process.wait(timeout=45)
        except subprocess.TimeoutExpired:
            return None

    def refused(self, token: str | None = None) -> str:
        """Starts it, expects that it gives up, and gives its last words; "" if it runs."""
        self.begin(token)
        if wait(90, lambda: not self.runs() or self.is_up()) is None or self.runs():
            self.kill()
            return ""
        return self.last_line()


class Answer:
    """What came of a request."""

    def __init__(self):
        self.status, self.text, self.events = 0, "", 0
        self.error: str | None = None
        self.began, self.first, self.ended = time.monotonic(), None, None

    def read(self, response: http.client.HTTPResponse, stream: bool) -> None:
        self.status = response.status
        if response.status != 200 or not stream:
            body = json.loads(response.read())
            self.error = body.get("error", {}).get("message")
            self.text = "" if self.error else body["choices"][0]["text"]
            return
        done = False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            self.first = self.first or time.monotonic()
            data = line[6:].strip()
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            self.error = event["error"]["message"] if "error" in event else self.error
            self.text += "".join(choice["text"] for choice in event.get("choices", []))
            self.events += 1
        if not done and not self.error:
            self.error = "the stream ended without its end"

    def took(self) -> float:
        return self.ended - self.began


class in_netns:
    """The calling thread in a network namespace, for the sockets that it makes there."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        self.home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        set_netns(there)
        os.close(there)

    def __exit__(self, *_):
        set_netns(self.home)
        os.close(self.home)


def set_netns(descriptor: int) -> None:
    clone_newnet = 0x40000000
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, clone_newnet):
        raise OSError(ctypes.get_errno(), "setns")


def tails(nodes: list[Node], lines: int = 25) -> None:
    """The ends of the logs, after a failure."""
    for node in nodes:
        if os.path.exists(node.log):
            with open(node.log) as log:
                print(f"--- {node.name}\n" + "".join(log.readlines()[-lines:]), flush=True)
