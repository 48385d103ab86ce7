"""What may go wrong between a beamline and its compute nodes."""


class BridgeError(Exception):
    """Of which all others are."""


class ConfigError(BridgeError):
    """A file or an option says what cannot be meant; names it."""


class SchedulerRefused(BridgeError):
    """A scheduler said no, and would again: the account, a limit, the queue. Its own words."""


class SchedulerUnreachable(BridgeError):
    """A scheduler gave no answer: nothing is known, also not whether it did what it was asked."""


class BudgetExceeded(BridgeError):
    """What an account has left does not cover a request; names the account and the numbers."""


class RecordError(BridgeError):
    """The record of leases cannot be read or written."""
