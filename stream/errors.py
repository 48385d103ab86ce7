"""Everything this package raises on purpose. The message names the thing and the value.

XpcsStreamError
├── ConfigError         what the user wrote cannot be meant
├── RoiMapError         a map of pixels to bins is unusable
├── DecodeError         bytes are not what they should be; the stream goes on without them
├── SourceError         the transport of a source is gone
│   └── NotSeekable     a source was asked to go back and cannot
├── SinkError           a sink could not deliver
├── CheckpointError     a checkpoint is damaged or belongs to something else
│   └── Superseded      another owner goes on from it
└── BrokerError         a Kafka broker of ours cannot be started, or ended by itself
"""


class XpcsStreamError(Exception):
    """Base of all errors of this package."""


class ConfigError(XpcsStreamError):
    """What the user wrote cannot be meant."""


class RoiMapError(XpcsStreamError):
    """A map of pixels to bins is unusable."""


class DecodeError(XpcsStreamError):
    """Bytes are not what they should be; the stream goes on without them."""


class SourceError(XpcsStreamError):
    """The transport of a source is gone."""


class NotSeekable(SourceError):
    """A source was asked to go back and cannot."""


class SinkError(XpcsStreamError):
    """A sink could not deliver."""


class CheckpointError(XpcsStreamError):
    """A checkpoint is damaged or belongs to something else."""


class Superseded(CheckpointError):
    """Another owner of the region goes on from its checkpoints: what is done here does not count any more."""


class BrokerError(XpcsStreamError):
    """A Kafka broker of ours cannot be started, or ended by itself."""
