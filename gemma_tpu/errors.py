"""The two ways in which this package stops on purpose; the command line turns both into one message, no traceback."""


class UserError(Exception):
    """What the user gave is wrong: the message holds the value, the rule and what to change. Exit code 2."""


class RunError(Exception):
    """The input was fine and the run failed (disk full, bad shard, verification out of bounds). Exit code 1."""
