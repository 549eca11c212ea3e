"""The one error that a user can mend: it names the setting, file or row, and the remedy. Jobs print it without a traceback."""


class Refused(Exception):
    """A setting, file or state that the engine will not work with; the message says what to change."""


class Collapsed(Refused):
    """Training was stopped because the student maps everything to nearly one point."""
