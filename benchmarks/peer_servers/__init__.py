"""The same weights behind other servers' dynamic batching; each server runs in an environment of its own."""
