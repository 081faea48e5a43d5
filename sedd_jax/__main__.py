"""python -m sedd_jax train | eval | sample | report"""

import sys

from sedd_jax.cli import main

sys.exit(main())
