"""`python -m gemma_tpu` is `gemma-tpu`."""

import sys

from gemma_tpu.cli import main

sys.exit(main())
