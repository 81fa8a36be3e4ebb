"""`python -m diffzoo` is `diffzoo`."""

import sys

from diffzoo.cli.main import main

sys.exit(main())
