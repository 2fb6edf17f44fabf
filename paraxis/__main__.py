"""`python -m paraxis`, which is how the launcher starts its workers."""

import sys

from paraxis.cli import main

sys.exit(main())
