"""A Tiled server that can be killed and started again, and one in front of it that loses requests or answers."""

import http.client
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import tiled.client

from tests.kafka import free_ports

DEADLINE = 150
KEY = "fb54e0a1c6"


class Server:
    """Keeps what it has in a directory, and reads files of `readable`."""

    def __init__(self, directory, readable):
        self.port = free_ports(1)[0]
        self.uri = f"http://127.0.0.1:{self.port}"
        storage = ("-w", str(directory / "data"), "-w", f"duckdb:///{directory}/tables.duckdb", "-r", str(readable))
        self._command = [
            *(Path(sys.executable).with_name("tiled"), "serve", "catalog", directory / "catalog.db", "--init"),
            *(*storage, "--api-key", KEY, "--port", str(self.port)),
        ]

    def start(self):
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said, is_up = [], threading.Event()

        def listen():
            for line in self.process.stdout:
                said.append(line)
                if "startup complete" in line:
                    is_up.set()

        self._listener = threading.Thread(target=listen)
        self._listener.start()
        assert is_up.wait(DEADLINE), "".join(said)
        return self

    def kill(self):
        self.process.kill()
        self._listener.join()
        with self.process:
            pass

    @contextmanager
    def client(self):
        client = tiled.client.from_uri(self.uri, api_key=KEY)
        with client.context:
            yield client


class Network:
    """Passes everything on to a server, but where it `loses` something closes the connection instead.

    Then the server either never got the "request", or what it answered is lost ("answer"). Told method and path.
    """

    def __init__(self, server, lost="request"):
        self.loses = lambda method, path: False
        network = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.close_connection = network.loses(self.command, self.path)
                if self.close_connection and lost == "request":
                    return
                with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as to:
                    to.request(self.command, self.path, body, dict(self.headers))
                    answer = to.getresponse()
                    content = answer.read()
                if self.close_connection:
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

            def log_message(self, *_):
                pass

        self._listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._listening.serve_forever)
        self.uri = f"http://127.0.0.1:{self._listening.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listening.shutdown()
        self._thread.join()
        self._listening.server_close()
