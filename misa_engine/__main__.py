"""``python -m misa_engine``: the ``misa`` command."""

import sys

from misa_engine.cli.main import main

sys.exit(main())
