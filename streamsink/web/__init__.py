"""HTTP on the endpoint's port: health, metrics and status webhooks."""
