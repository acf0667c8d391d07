"""`python -m awq_core.cli`, for where the `awq` script is not on the path."""

from __future__ import annotations

from awq_core.cli import main

if __name__ == "__main__":
    main()
