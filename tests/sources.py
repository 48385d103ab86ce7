"""A source from a list, seekable by index, which can break down, and a sink that remembers."""

import contextlib

from stream.errors import SinkError, SourceError


class ListSource(contextlib.nullcontext):
    """Yields `messages`; a message that is an exception is raised, one that is callable is called and gives nothing."""

    def __init__(self, messages):
        super().__init__(self)
        self.messages = messages
        self.next = 0
        self.acknowledged = {}

    def __iter__(self):
        while self.next < len(self.messages):
            message = self.messages[self.next]
            self.next += 1
            if isinstance(message, Exception):
                raise message
            yield message() if callable(message) else message

    def position(self):
        return {"message": self.next}

    def seek(self, position):
        self.next = position["message"]

    def acknowledge(self, position):
        self.acknowledged = position


class LiveSource(ListSource):
    """The same without a way back, like ZeroMQ: what was sent while nobody listened is gone."""

    def position(self):
        return {}

    def seek(self, position):
        raise SourceError("this source cannot seek")


class ListSink(contextlib.nullcontext):
    """Remembers what was written; refuses outputs for which `refuse` says so."""

    def __init__(self, refuse=lambda output: False):
        super().__init__(self)
        self.outputs = []
        self.flushed = 0
        self.refuse = refuse

    def write(self, output):
        if self.refuse(output):
            raise SinkError("refused")
        self.outputs.append(output)

    def flush(self):
        self.flushed = len(self.outputs)

    def results(self, *, final):
        """Newest arrays by run and operator."""
        return {(o.run, o.operator): o.arrays for o in self.outputs if getattr(o, "final", None) is final}
