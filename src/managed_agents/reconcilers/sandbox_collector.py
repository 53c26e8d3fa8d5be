"""The one that stops and destroys sandboxes of this host; nothing else does.

Stops those whose session rests and which nobody used for a while (files stay), destroys those of deleted or archived sessions
and of lower generations, and whatever of ours the backend knows and no row does: the leftovers of a crash.
"""

import logging

logger = logging.getLogger(__name__)
