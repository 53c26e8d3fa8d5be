"""One model request: built from the transcript, streamed, its end or its failure as a value.

Failures are data here: the loop decides what becomes of them.
"""

import logging

logger = logging.getLogger(__name__)
