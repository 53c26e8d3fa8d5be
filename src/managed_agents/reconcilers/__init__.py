"""Background work that is not a session: input-less, safe to run anywhere and twice.

Each looks at the present state, compares it with the intended one, and acts. A crash in the middle needs nothing special: the
next look sees what is left.
"""
