"""A FAKE of Globus Auth and Transfer on loopback: as much of the documented API as an unmodified client asks for.

It moves real files between folders, and misbehaves as it is told to. Where the real services would do something else,
nothing here says so.
"""

import base64
import hashlib
import json
import threading
import uuid
from collections import defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LOSE_REPLY = "lose the reply"
HOLD_REPLY = "hold the reply back until it is of no use"
CLIENT, SECRET = "5b1e3c9e-0000-4000-8000-000000000001", "a secret"
DATA_ACCESS = "https://auth.globus.org/scopes/{}/data_access"


def error(status, code, message="as it was told", headers=None, **more):
    """What a request is answered with."""
    return status, {"code": code, "message": message, "request_id": "fake", **more}, headers or {}


class FakeGlobus:
    """Answers at `url`.

    Parameters
    ----------
    collections
        Folder of each collection.

    Attributes
    ----------
    answers
        What the next requests to an operation get instead of being heard, or LOSE_REPLY, HOLD_REPLY; by operation.
    behaviours
        Of the next tasks: corrupt, corrupt unseen, fault, fail, pause, connect, cancel.
    going
        Cleared, tasks wait with half a file moved.
    """

    def __init__(self, collections, port=0):
        self.collections = collections
        self.answers = defaultdict(deque)
        self.behaviours = deque()
        self.going = threading.Event()
        self.going.set()
        self.held = threading.Event()
        self.tasks = {}
        self.documents = []
        self.heard = []
        self.tokens = set()
        self.n_tokens = 0
        self.most_active = 0
        self.submissions = {}
        self.given = set()
        self.lock = threading.RLock()
        self.threads = []
        self.closing = False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                fake.answer(self, "")

            def do_POST(self):
                fake.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.environment = {"GLOBUS_SDK_SERVICE_URL_TRANSFER": self.url, "GLOBUS_SDK_SERVICE_URL_AUTH": self.url}

    def __enter__(self):
        self.serving = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.serving.start()
        return self

    def __exit__(self, *_):
        self.closing = True
        self.going.set()
        self.held.set()
        self.resume()
        self.server.shutdown()
        self.server.server_close()
        self.serving.join()
        for thread in self.threads:
            thread.join()

    def expire(self, task):
        """Forget a task, and what was submitted for it."""
        with self.lock:
            del self.tasks[task]
            self.submissions = {submission: known for submission, known in self.submissions.items() if known != task}

    def resume(self):
        for task in self.tasks.values():
            task["resumed"].set()

    def answer(self, handler, body):
        path = urlsplit(handler.path)
        operation = self.operation(path.path)
        with self.lock:
            self.heard.append(operation)
            planned = self.answers[operation].popleft() if self.answers[operation] else None
        if planned in (None, LOSE_REPLY, HOLD_REPLY):
            status, said, headers = self.do(operation, handler, path, body)
        else:
            status, said, headers = planned
        if planned == HOLD_REPLY:
            self.held.wait()
        if planned in (LOSE_REPLY, HOLD_REPLY):
            handler.close_connection = True
            return
        text = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if isinstance(said, str) else "application/json")
        handler.send_header("Content-Length", str(len(text)))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text)

    def operation(self, path):
        parts = path.strip("/").split("/")
        if parts[-1] == "cancel" or parts[-1] == "ls":
            return parts[-1]
        return "task" if len(parts) > 2 and parts[1] == "task" else parts[-1]

    def do(self, operation, handler, path, body):
        authorization = handler.headers.get("Authorization", "")
        if operation == "token":
            return self.token(authorization, parse_qs(body))
        if authorization.removeprefix("Bearer ") not in self.tokens:
            return error(401, "AuthenticationFailed", "Token is not active")
        query = {key: values[0] for key, values in parse_qs(path.query).items()}
        last = unquote(path.path.strip("/").split("/")[3 if operation in ("cancel", "ls") else -1])
        with self.lock:
            match operation:
                case "submission_id":
                    self.given.add(value := str(uuid.uuid4()))
                    return 200, {"DATA_TYPE": "submission_id", "value": value}, {}
                case "transfer":
                    return self.submit(json.loads(body))
                case "task_list":
                    return self.task_list(query.get("filter", ""))
                case "ls":
                    return self.ls(last, query.get("path", "/"))
            task = unquote(path.path.strip("/").split("/")[2])
            if task not in self.tasks:
                return error(404, "ClientError.NotFound", f"Could not find task {task}")
            if operation == "cancel":
                over = self.tasks[task]["status"] != "ACTIVE"
                self.tasks[task]["canceled"].set()
                self.tasks[task]["resumed"].set()
                return 200, {"DATA_TYPE": "result", "code": "TaskComplete" if over else "CancelAccepted"}, {}
            return 200, self.shown(self.tasks[task]), {}

    def token(self, authorization, form):
        expected = "Basic " + base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if authorization != expected or form["grant_type"] != ["client_credentials"]:
            return 401, {"error": "invalid_client"}, {}
        self.n_tokens += 1
        self.tokens.add(token := f"token{self.n_tokens}")
        granted = {
            "access_token": token,
            "expires_in": 172800,
            "resource_server": "transfer.api.globus.org",
            "scope": "urn:globus:auth:scope:transfer.api.globus.org:all",
            "token_type": "Bearer",
            "other_tokens": [],
        }
        return 200, granted, {}

    def submit(self, document):
        submission = document["submission_id"]
        if submission not in self.given:
            return error(400, "ClientError.BadRequest", f"{submission} was never given")
        for endpoint in (document["source_endpoint"], document["destination_endpoint"]):
            if endpoint not in self.collections:
                return error(404, "EndpointNotFound", f"No such endpoint {endpoint}")
        code = "Duplicate"
        if submission not in self.submissions:
            code = "Accepted"
            self.documents.append(document)
            self.submissions[submission] = self.begin(document)
        result = {"DATA_TYPE": "transfer_result", "code": code, "submission_id": submission}
        return 202, {**result, "task_id": self.submissions[submission], "message": code}, {}

    def begin(self, document):
        name = str(uuid.uuid4())
        self.tasks[name] = {
            "task_id": name,
            "type": "TRANSFER",
            "status": "ACTIVE",
            "label": document["label"],
            "bytes_transferred": 0,
            "files_transferred": 0,
            "files_skipped": 0,
            "faults": 0,
            "is_paused": False,
            "nice_status": None,
            "fatal_error": None,
            "canceled": threading.Event(),
            "resumed": threading.Event(),
        }
        behaviour = self.behaviours.popleft() if self.behaviours else ""
        active = sum(task["status"] == "ACTIVE" for task in self.tasks.values())
        self.most_active = max(self.most_active, active)
        self.threads.append(threading.Thread(target=self.move, args=(self.tasks[name], document, behaviour)))
        self.threads[-1].start()
        return name

    def shown(self, task):
        return {key: value for key, value in task.items() if not isinstance(value, threading.Event)}

    def task_list(self, wanted):
        clauses = dict(clause.split(":", 1) for clause in wanted.split("/") if clause)
        found = [
            self.shown(task)
            for task in self.tasks.values()
            if all(task[key] == value for key, value in clauses.items())
        ]
        return 200, {"DATA_TYPE": "task_list", "DATA": found, "total": len(found), "offset": 0, "limit": 100}, {}

    def ls(self, endpoint, path):
        folder = self.collections[endpoint] / path.strip("/")
        if not folder.is_dir():
            return error(404, "ClientError.NotFound", f"Directory {path} not found on endpoint")
        entries = [
            {
                "DATA_TYPE": "file",
                "name": file.name,
                "type": "dir" if file.is_dir() else "file",
                "size": file.stat().st_size,
            }
            for file in folder.iterdir()
        ]
        return 200, {"DATA_TYPE": "file_list", "path": path, "DATA": entries}, {}

    def move(self, task, document, behaviour):
        def fail(code, description):
            task["fatal_error"] = {"code": code, "description": description}
            task["status"] = "FAILED"

        if behaviour in ("pause", "connect"):
            task["is_paused"] = behaviour == "pause"
            task["nice_status"] = "PAUSED_BY_ADMIN" if behaviour == "pause" else "CONNECT_FAILED"
            task["nice_status_details"] = "as it was told"
            task["resumed"].wait()
            task["is_paused"], task["nice_status"], task["nice_status_details"] = False, "OK", None
        if behaviour == "fault":
            task["faults"] = 3
        if behaviour == "cancel":
            return fail("CANCELED", "canceled")
        for item in document["DATA"]:
            source = self.collections[document["source_endpoint"]] / item["source_path"].lstrip("/")
            target = self.collections[document["destination_endpoint"]] / item["destination_path"].lstrip("/")
            if not source.is_file():
                return fail("FILE_NOT_FOUND", str(item["source_path"]))
            content = source.read_bytes()
            if target.is_file() and target.read_bytes() == content and document["sync_level"] == 3:
                task["files_skipped"] += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                self.going.wait()
                if task["canceled"].is_set():
                    return fail("CANCELED", "canceled")
                if self.closing:
                    return None
                rest = bytearray(content[len(content) // 2 :])
                if behaviour.startswith("corrupt"):
                    rest[0] ^= 1
                file.write(rest)
            task["bytes_transferred"] += len(content)
            if behaviour == "fail":
                return fail("ENDPOINT_ERROR", "the disk of the endpoint went away")
            if behaviour != "corrupt unseen":
                assert item["checksum_algorithm"] == "sha256"
                if hashlib.sha256(target.read_bytes()).hexdigest() != item["external_checksum"]:
                    return fail("CHECKSUM_MISMATCH", f"{item['destination_path']} is not as its external checksum")
            task["files_transferred"] += 1
        task["status"] = "SUCCEEDED"
        return None
