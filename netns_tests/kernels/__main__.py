from __future__ import annotations

import sys

from netns_tests.kernels.runner import main

sys.exit(main())
