"""xdist: turn an English sentence encoder that knows a domain into a multilingual one, on a laptop or a Ray cluster.

Importing this package imports neither torch nor ray; each stage imports what it needs when it runs.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

if (_Path(__file__).parent / "workermanage.py").exists():
    raise ImportError(
        "pytest-xdist is installed over xdist-ray: both own the module name `xdist`. "
        "Run `pip uninstall pytest-xdist` and then `pip install --force-reinstall --no-deps xdist-ray`."
    )
