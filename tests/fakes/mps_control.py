"""nvidia-cuda-mps-control as its documentation has it, for machines without a GPU: a control daemon, its server, and the client that commands it.

Real processes and sockets in the pipe directory. A client of the server is who connects to `server` there and says its process id; the end of that
connection is to it what the loss of the GPU context is to a real one. SIGUSR1 to the server is a client's fatal fault: all clients are lost.
In the foreground it logs to its standard output; what it says was written down from the program of driver 550 on a machine without a GPU.
What FAKE_MPS says: `broken` does not start, `stuck` starts a server that never becomes ready, `blind` one that finds no GPU and ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

PIPE = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))


def log(text: str) -> None:
    print(f"[2026-01-01 00:00:00.000 Control {os.getpid()}] {text}", flush=True)


def listen(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(PIPE / name))
    sock.listen(64)
    return sock


def ask(name: str, text: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(PIPE / name))
        sock.sendall(f"{text}\n".encode())
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile() as answer:
            return answer.read()


class Server:
    """nvidia-cuda-mps-server."""

    def __init__(self) -> None:
        self.clients: dict[int, socket.socket] = {}
        self.status = "INITIALIZING" if os.environ.get("FAKE_MPS") == "stuck" else "ACTIVE"
        self.lock = threading.Lock()

    def serve(self) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: self.fault())
        sock = listen("server")
        (PIPE / "ready").touch()
        while True:
            peer, _ = sock.accept()
            threading.Thread(target=self.talk, args=(peer,), daemon=True).start()

    def talk(self, peer: socket.socket) -> None:
        with peer, peer.makefile() as lines:
            word, _, argument = lines.readline().strip().partition(" ")
            if word == "client":
                self.keep(int(argument), peer, lines)
            else:
                peer.sendall(self.answer(word, argument).encode())

    def keep(self, pid: int, peer: socket.socket, lines: object) -> None:
        with self.lock:
            if self.status != "ACTIVE":
                return
            self.clients[pid] = peer
        peer.sendall(b"joined\n")
        lines.read()  # type: ignore[attr-defined]
        with self.lock:
            self.clients.pop(pid, None)

    def answer(self, word: str, argument: str) -> str:
        with self.lock:
            if word == "status":
                return self.status
            if word == "terminate" and int(argument) in self.clients:
                self.clients[int(argument)].shutdown(socket.SHUT_RDWR)
            return "".join(f"{pid}\n" for pid in self.clients)

    def fault(self) -> None:
        self.status = "FAULT"
        for peer in list(self.clients.values()):
            peer.shutdown(socket.SHUT_RDWR)


class Daemon:
    """nvidia-cuda-mps-control -f."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[bytes] | None = None

    def serve(self) -> None:
        log("Starting control daemon")
        sock = listen("control")
        while True:
            peer, _ = sock.accept()
            with peer, peer.makefile() as lines:
                for line in lines:
                    log(f"Cmd:{line.strip()}")
                    peer.sendall(self.carry_out(*line.split()).encode())

    def carry_out(self, word: str = "", *arguments: str) -> str:
        if word == "start_server" and self.server is None:
            self.server = subprocess.Popen([sys.executable, __file__, "--server"])
            if os.environ.get("FAKE_MPS") == "blind":
                log(f"Server {self.server.pid} exited with status {self.server.wait()}")
                self.server = None
            return ""
        if word == "quit":
            if self.server is not None:
                self.server.kill()
                self.server.wait()
            os._exit(0)
        if self.server is None or not (PIPE / "ready").exists():
            return ""
        if word == "get_server_list":
            return f"{self.server.pid}\n"
        if int(arguments[0]) != self.server.pid or self.server.poll() is not None:
            return f"Server {arguments[0]} not found\n"
        if word == "get_server_status":
            return ask("server", "status") + "\n"
        if word == "get_client_list":
            return ask("server", "clients")
        if word == "terminate_client":
            ask("server", f"terminate {arguments[1]}")
            return ""
        return f'Unknown command "{word}"\n'


def main() -> int:
    if "--server" in sys.argv:
        if os.environ.get("FAKE_MPS") == "blind":
            log("Failed to start : no CUDA-capable device is detected")
            return 1
        Server().serve()
    if "-f" in sys.argv:
        if os.environ.get("FAKE_MPS") == "broken":
            log("Failed to start: the fake is broken")
            return 1
        Daemon().serve()
    for line in sys.stdin:
        try:
            sys.stdout.write(ask("control", line.strip()))
        except OSError:
            print("Cannot find MPS control daemon process")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
