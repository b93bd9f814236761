"""Which errors mean that the command was wrongly used? They end it with exit code 2."""


class JobError(ValueError):
    """A job says something that cannot be meant."""


class NoDeviceError(RuntimeError):
    """CuPy is missing, or finds no device."""
