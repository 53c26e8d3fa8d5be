"""Rate limits: how many requests a minute, and who counts them."""
