"""What keys are derived from the master key for. A name here is for ever: another one makes another key."""

API_KEYS = "api-keys"
SECRETS = "sealed-secrets"
