"""What a user's mistake raises. Our own invariants are asserts.

EngramError
|-- ConfigError      a field of a specification, preset or configuration cannot be used
|-- AddressError     token ids, histories or masks that cannot be addressed
|-- MismatchError    files that do not belong together: tokenizer, map, specification, weights
|-- DataError        text, token or checkpoint files that are missing, damaged or too short
`-- WorkerError      workers of one run that died, do not answer, or were started wrongly

UntrainedRowsWarning is the one warning: rows that will not be trained, or not as the rest is.
"""


class EngramError(Exception):
    """Base of all of them; the command line prints it as one line and exits with 2."""


class ConfigError(EngramError):
    """Names the field, its value, and what would be accepted."""


class AddressError(EngramError):
    """Names the position and value of the first id that has no address."""


class MismatchError(EngramError):
    """Names both checksums, or both values, that ought to be equal."""


class DataError(EngramError):
    """Names the file or the request that cannot be served."""


class WorkerError(EngramError):
    """Names the worker that noticed, and what it waited for or was given."""


class UntrainedRowsWarning(UserWarning):
    """Names the table, and who has left, dropped or not scaled the gradient of its rows."""
