"""A link of TCP that a test can cut and restore."""

import socket
import threading
from contextlib import suppress


class Link:
    """Forwards what comes to `address` to another one, both ways. While it is cut, connections break and none is made.

    Parameters
    ----------
    to
        ``host:port``
    """

    def __init__(self, to):
        host, _, port = to.rpartition(":")
        self._to = host, int(port)
        self._is_cut = False
        self._lock = threading.Lock()
        self._pairs = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self):
        with self._lock:
            self._is_cut = True
            for one in (each for pair in self._pairs for each in pair):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def restore(self):
        with self._lock:
            self._is_cut = False

    def _accept(self):
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                with self._lock:
                    if self._is_cut:
                        here.close()
                        continue
                try:
                    there = socket.create_connection(self._to)
                except OSError:  # nobody is there yet
                    here.close()
                    continue
                with self._lock:
                    self._pairs.append((here, there))
                closing = threading.Barrier(2, action=lambda pair=(here, there): [each.close() for each in pair])
                for pair in ((here, there), (there, here)):
                    self._threads.append(threading.Thread(target=_pump, args=(*pair, closing), daemon=True))
                    self._threads[-1].start()


def _pump(source, target, closing):
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    closing.wait()
