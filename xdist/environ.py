"""Variables of this process' environment, for a while."""

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def having(given: Mapping[str, str]) -> Iterator[None]:
    """Within it these variables are set; after it they are as before, and others as they have become."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
