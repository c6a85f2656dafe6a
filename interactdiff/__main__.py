"""python -m interactdiff"""

import sys

from interactdiff.cli import main

sys.exit(main())
